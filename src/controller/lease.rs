//! The controller's pods -> one leader: a Lease that is held, renewed, and released at the end.
//!
//! Times are client-go's: a Lease counts for 15 s, its holder renews it every 2 s and stops when that failed for 10 s.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;

use super::presence::in_time;

const DURATION: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);

/// A claim to lead.
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The last holder and when it was seen on this machine's clock; clocks of machines differ.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Election {
    /// Returns an election by the Lease of that name, in which this process takes part as `identity`.
    pub fn new(api: Api<Lease>, name: &str, identity: &str) -> Election {
        Election { api, name: name.into(), identity: identity.into(), seen: None }
    }

    /// Waits until this process leads.
    pub async fn won(&mut self) {
        loop {
            match in_time(RENEW_DEADLINE, self.attempt()).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(target: "hone", "lease {}: {error}", self.name),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Renews the Lease; returns why the lead was lost. An attempt that hangs counts as one that fails.
    pub async fn lost(&mut self) -> String {
        let mut renewed = Instant::now();
        while renewed.elapsed() < RENEW_DEADLINE {
            tokio::time::sleep(RETRY.min(RENEW_DEADLINE.saturating_sub(renewed.elapsed()))).await;
            let begun = Instant::now();
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match in_time(left, self.attempt()).await {
                Ok(true) => renewed = begun,
                Ok(false) => {
                    let holder = self.seen.as_ref().and_then(|(spec, _)| spec.holder_identity.clone());
                    return format!("{} leads now", holder.as_deref().unwrap_or("another process"));
                }
                Err(error) => tracing::warn!(target: "hone", "lease {}: {error}", self.name),
            }
        }
        format!("the leader's Lease could not be renewed for {} s", RENEW_DEADLINE.as_secs())
    }

    /// Releases the Lease, so that the next leader need not wait.
    pub async fn release(&mut self) {
        let give = async {
            let Some(mut lease) = self.api.get_opt(&self.name).await? else { return Ok(()) };
            if let Some(spec) = lease.spec.as_mut().filter(|spec| self.is_ours(spec)) {
                spec.holder_identity = Some(String::new());
                spec.lease_duration_seconds = Some(1);
                self.api.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok(())
        };
        // A Lease that cannot be released expires.
        if let Err(error) = in_time(RETRY, give).await {
            tracing::warn!(target: "hone", "Lease {} is not released: {error}", self.name);
        }
    }

    /// Returns whether this process holds the Lease after one try. If two try at once, one gets a conflict.
    async fn attempt(&mut self) -> kube::Result<bool> {
        let written = match self.api.get_opt(&self.name).await? {
            None => {
                let lease = Lease {
                    metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
                    spec: Some(self.spec(None)),
                };
                self.api.create(&PostParams::default(), &lease).await
            }
            Some(mut lease) => {
                let spec = lease.spec.clone().unwrap_or_default();
                if !self.is_ours(&spec) && !self.is_free(&spec) {
                    return Ok(false);
                }
                lease.spec = Some(self.spec(Some(&spec)));
                self.api.replace(&self.name, &PostParams::default(), &lease).await
            }
        };
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn is_ours(&self, spec: &LeaseSpec) -> bool {
        spec.holder_identity.as_deref() == Some(self.identity.as_str())
    }

    /// Returns whether nobody holds the Lease, or whether it was not renewed for its whole duration while this process
    /// watched it.
    fn is_free(&mut self, spec: &LeaseSpec) -> bool {
        if spec.holder_identity.as_deref().unwrap_or_default().is_empty() {
            return true;
        }
        match &self.seen {
            Some((seen, since)) if seen == spec => {
                let seconds =
                    spec.lease_duration_seconds.map_or(DURATION.as_secs(), |seconds| seconds.max(1) as u64);
                since.elapsed() >= Duration::from_secs(seconds)
            }
            _ => {
                self.seen = Some((spec.clone(), Instant::now()));
                false
            }
        }
    }

    fn spec(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let kept = old.filter(|old| self.is_ours(old));
        let transitions = old.and_then(|old| old.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: kept.and_then(|old| old.acquire_time.clone()).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if kept.is_some() {
                transitions
            } else {
                transitions + i32::from(old.is_some())
            }),
            ..LeaseSpec::default()
        }
    }
}
