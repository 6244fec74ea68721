//! An adapter's files -> a folder of this machine, such as a mounted volume; each file appears whole.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::fault::{Fault, Result};
use crate::whole;

/// # Errors
/// Config: both folders are one.
pub fn check(to: &Path, adapter: &Path) -> Result<()> {
    let real = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path));
    match (real(to), real(adapter)) {
        (Ok(to), Ok(adapter)) if to == adapter => {
            Err(Fault::config(format!("the adapter would be copied onto itself: {}", to.display()))
                .help("push to another folder: file:DIR"))
        }
        _ => Ok(()),
    }
}

/// Copies the files; the folder is made if it is not there.
///
/// # Errors
/// Config, Storage: the folder cannot be made or written.
pub fn publish(files: &[(&str, PathBuf)], from: &Path, to: &Path) -> Result<()> {
    check(to, from)?;
    fs::create_dir_all(to).map_err(|error| Fault::storage("create", to, &error))?;
    for (name, path) in files {
        let mut source = File::open(path).map_err(|error| Fault::storage("read", path, &error))?;
        whole::fill(&to.join(name), |target| io::copy(&mut source, target).map(|_| ()))?;
    }
    whole::sync_folder(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_copied_over_earlier_ones_and_never_onto_themselves() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("a/b"));
        fs::create_dir_all(&from).unwrap();
        fs::write(from.join("one"), "1").unwrap();
        let files = [("one", from.join("one"))];
        for content in ["1", "2"] {
            fs::write(from.join("one"), content).unwrap();
            publish(&files, &from, &to).unwrap();
            assert_eq!(fs::read_to_string(to.join("one")).unwrap(), content);
        }
        assert!(publish(&files, &from, &from.join(".")).is_err());
        assert_eq!(fs::read_to_string(from.join("one")).unwrap(), "2");
    }
}
