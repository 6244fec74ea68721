//! `s3://BUCKET/KEY`: Amazon S3, and servers with the same protocol.
//!
//! The environment is that of AWS's own tools. Credentials come from `AWS_ACCESS_KEY_ID` and
//! `AWS_SECRET_ACCESS_KEY` (with `AWS_SESSION_TOKEN`), else a web identity (`AWS_WEB_IDENTITY_TOKEN_FILE`,
//! `AWS_ROLE_ARN`), else a container or pod (`AWS_CONTAINER_CREDENTIALS_...`), else the profile `AWS_PROFILE` of
//! `~/.aws/credentials`, else the machine. `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` names another server. Public
//! buckets need `AWS_SKIP_SIGNATURE=true`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;

use super::{Caught, Scheme, retries};

/// The scheme of Amazon S3 and servers with its protocol.
pub static SCHEME: Scheme = Scheme {
    name: "s3",
    help: "credentials are looked for in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the pod's identity, ~/.aws/credentials \
           and the machine's role; AWS_REGION names the bucket's region, AWS_ENDPOINT_URL another server, and a public \
           bucket needs AWS_SKIP_SIGNATURE=true",
    open,
};

fn open(bucket: &str, client: Caught) -> object_store::Result<Arc<dyn ObjectStore>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retries())
        .with_http_connector(client);
    if let Some(endpoint) = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL")) {
        builder = builder.with_endpoint(endpoint).with_allow_http(true);
    }
    let others =
        ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"];
    let others = others.into_iter().chain(["AWS_CONTAINER_CREDENTIALS_FULL_URI"]);
    if !others.into_iter().any(|name| variable(name).is_some()) {
        let file = variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
        let file = file.or_else(|| Some(Path::new(&variable("HOME")?).join(".aws/credentials")));
        let text = file.and_then(|file| crate::plain::text(&file).ok()).unwrap_or_default();
        let profile = profile(&text, &variable("AWS_PROFILE").unwrap_or_else(|| "default".into()));
        let value = |name: &str| profile.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        if let (Some(id), Some(secret)) = (value("aws_access_key_id"), value("aws_secret_access_key")) {
            builder = builder.with_access_key_id(id).with_secret_access_key(secret);
            if let Some(token) = value("aws_session_token") {
                builder = builder.with_token(token);
            }
        }
    }
    Ok(Arc::new(builder.build()?))
}

/// Returns the keys and values of one profile of AWS's credentials file.
fn profile(text: &str, name: &str) -> Vec<(String, String)> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(title) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = title.trim() == name;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside && !line.starts_with('#')) {
            found.push((key.trim().to_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_read_alone() {
        let text = "[default]\naws_access_key_id = A\n# aws_secret_access_key = no\n\n[team]\naws_access_key_id=B\naws_secret_access_key = x=y\n";
        let read = |name| {
            profile(text, name).iter().map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>()
        };
        assert_eq!(read("default"), ["aws_access_key_id A"]);
        assert_eq!(read("team"), ["aws_access_key_id B", "aws_secret_access_key x=y"]);
        assert!(read("other").is_empty());
    }
}
