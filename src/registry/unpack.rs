//! Layer (tar, plain or gzipped) -> regular files under `data/`, or files with certain names, in a folder of ours.
//! Nothing in the archive is trusted.
//!
//! Only regular files and directories are ever created, so no link can lead a later entry out of the folder.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use crate::fault::{Fault, Kind, Result};

const ROOT: &str = "data";
const WHITEOUT: &str = ".wh.";
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// LIMIT: size of header blocks, long names and PAX records in front of one entry, which are held in memory.
const ENTRY_HEAD_BYTES_MAX: u64 = 1 << 20;

/// LIMIT: sizes of one image, over all layers.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Number of entries of any kind; a distribution's base image has about 10,000.
    pub entries_max: u64,
    /// Bytes written to disk.
    pub extracted_bytes_max: u64,
    /// Bytes after decompression, including skipped entries.
    pub expanded_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { entries_max: 1_000_000, extracted_bytes_max: 16 << 30, expanded_bytes_max: 64 << 30 }
    }
}

/// The entries that are extracted.
#[derive(Clone, Copy)]
pub(super) enum Choice {
    /// Everything below `data/`, which becomes the folder. Anything there but a file or a folder is an error.
    Data,
    /// Regular files whose name the function accepts, at their paths in the image. Other entries are skipped, since
    /// an image of a whole system also has links and devices.
    Named(fn(&str) -> bool),
}

/// Applies the layers of one image, first to last.
pub(super) struct Unpacker<'a> {
    folder: &'a Path,
    limits: Limits,
    choice: Choice,
    entries: u64,
    /// Bytes written so far.
    pub extracted_bytes: u64,
    expanded_bytes: u64,
}

impl<'a> Unpacker<'a> {
    /// Returns an unpacker into `folder`, which becomes the image's `data/`. The folder must exist and be empty, and
    /// nobody else may write to it.
    pub(super) fn new(folder: &'a Path, limits: Limits) -> Unpacker<'a> {
        Unpacker::choosing(folder, limits, Choice::Data)
    }

    pub(super) fn choosing(folder: &'a Path, limits: Limits, choice: Choice) -> Unpacker<'a> {
        Unpacker { folder, limits, choice, entries: 0, extracted_bytes: 0, expanded_bytes: 0 }
    }

    /// Unpacks one layer over the layers before it. `name` stands in messages.
    /// Data: the layer is damaged, hostile or too large. Storage: the disk failed.
    pub(super) fn layer(&mut self, layer: impl Read, name: &str) -> Result<()> {
        let budget = Budget::new(self.limits.expanded_bytes_max - self.expanded_bytes);
        let reader =
            Budgeted { inner: decoder(layer).map_err(|fault| fault.at(name))?, budget: budget.clone() };
        let result = self.entries(tar::Archive::new(reader), &budget);
        self.expanded_bytes = self.limits.expanded_bytes_max - budget.total.get();
        result.map_err(|fault| match budget.refused.get() {
            Some(what) => {
                Fault::data(format!("{name}: {what}")).help("this is not an adapter image; nothing was kept")
            }
            None => fault.at(name),
        })
    }

    fn entries<R: Read>(&mut self, mut archive: tar::Archive<R>, budget: &Budget) -> Result<()> {
        let mut entries = archive.entries().map_err(damaged)?;
        loop {
            budget.head.set(Some(ENTRY_HEAD_BYTES_MAX));
            let Some(entry) = entries.next() else { return Ok(()) };
            budget.head.set(None);
            let mut entry = entry.map_err(damaged)?;
            self.entries += 1;
            if self.entries > self.limits.entries_max {
                return Err(Fault::data(format!("more than {} entries", self.limits.entries_max)));
            }
            self.entry(&mut entry)?;
            io::copy(&mut entry, &mut io::sink()).map_err(damaged)?;
        }
    }

    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<()> {
        let written =
            entry.path().map_err(|error| Fault::data(format!("damaged name: {error}")))?.into_owned();
        let Some(path) = self.chosen(&written, entry.header().entry_type())? else { return Ok(()) };
        let target = self.folder.join(&path);
        if let Some(hidden) = whiteout(&path) {
            return self.remove(&hidden);
        }
        match entry.header().entry_type() {
            tar::EntryType::Directory => self.create_folder(&target),
            tar::EntryType::Regular if path.as_os_str().is_empty() => Err(Fault::data("`data` is a file")),
            tar::EntryType::Regular => self.write(entry, &target),
            other => Err(Fault::data(format!(
                "`{}` is a {}; only regular files are taken from `data/`",
                written.display().to_string().escape_debug(),
                kind_name(other)
            ))),
        }
    }

    /// Returns the entry's path below our folder; `None` if the entry is not extracted.
    fn chosen(&self, written: &Path, kind: tar::EntryType) -> Result<Option<PathBuf>> {
        let inside = inside(written)?;
        match self.choice {
            Choice::Data => Ok(inside.strip_prefix(ROOT).ok().map(Path::to_path_buf)),
            Choice::Named(wanted) => {
                let name = inside.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let taken = kind == tar::EntryType::Regular && wanted(name) || name.starts_with(WHITEOUT);
                Ok(Some(inside).filter(|_| taken))
            }
        }
    }

    fn write<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, target: &Path) -> Result<()> {
        let (size, room) = (entry.size(), self.limits.extracted_bytes_max - self.extracted_bytes);
        if size > room {
            return Err(Fault::data(format!("its files exceed {} bytes", self.limits.extracted_bytes_max)));
        }
        self.create_folder(target.parent().expect("a path inside the folder has a parent"))?;
        let storage = |error: io::Error| Fault::storage("write", target, &error);
        match fs::remove_file(target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(storage(error)),
            _ => {}
        }
        let mut file = File::create_new(target).map_err(storage)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = entry.read(&mut buffer).map_err(damaged)?;
            if count == 0 {
                break;
            }
            io::Write::write_all(&mut file, &buffer[..count]).map_err(storage)?;
            self.extracted_bytes += count as u64;
        }
        file.sync_all().map_err(storage)
    }

    fn create_folder(&self, path: &Path) -> Result<()> {
        fs::create_dir_all(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                Fault::data("a name is both a file and a folder")
            }
            _ => Fault::storage("create", path, &error),
        })
    }

    /// Removes an earlier layer's file or folder, which a whiteout hides. A path that does not exist is no error.
    fn remove(&self, hidden: &Path) -> Result<()> {
        let path = self.folder.join(hidden);
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Fault::storage("remove", &path, &error))
            }
            // The folder itself always exists.
            _ => self.create_folder(self.folder),
        }
    }
}

/// Returns the path inside the image. A path that leads out of it is refused.
fn inside(written: &Path) -> Result<PathBuf> {
    let mut inside = PathBuf::new();
    for component in written.components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(Fault::data(format!(
                    "`{}` leads out of the image",
                    written.display().to_string().escape_debug()
                )));
            }
        }
    }
    Ok(inside)
}

/// Returns the path that a whiteout hides: `.wh.name` hides its sibling `name`, `.wh..wh..opq` hides the whole folder
/// around it.
fn whiteout(path: &Path) -> Option<PathBuf> {
    let hidden = path.file_name()?.to_str()?.strip_prefix(WHITEOUT)?;
    let folder = path.parent()?;
    match hidden {
        ".wh..opq" => Some(folder.to_path_buf()),
        "" | "." | ".." => None,
        name => Some(folder.join(name)),
    }
}

fn kind_name(kind: tar::EntryType) -> &'static str {
    match kind {
        tar::EntryType::Symlink => "symbolic link",
        tar::EntryType::Link => "hard link",
        tar::EntryType::Char | tar::EntryType::Block => "device",
        tar::EntryType::Fifo => "named pipe",
        tar::EntryType::GNUSparse => "sparse file",
        _ => "special entry",
    }
}

/// Chooses the decoder by the first bytes, because media types are written by hand and often wrong.
fn decoder<'a>(mut layer: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    layer
        .by_ref()
        .take(ZSTD_MAGIC.len() as u64)
        .read_to_end(&mut magic)
        .map_err(|error| Fault::unread(Kind::Data, format!("cannot be read: {error}"), &error))?;
    let (gzip, zstd) = (magic.starts_with(&GZIP_MAGIC), magic == ZSTD_MAGIC);
    let whole = io::Cursor::new(magic).chain(layer);
    match (gzip, zstd) {
        (true, _) => {
            Ok(Box::new(flate2::read::MultiGzDecoder::new(io::BufReader::with_capacity(64 << 10, whole))))
        }
        (_, true) => {
            Err(Fault::data("the layer is compressed with zstd").help("push it as gzip or plain tar"))
        }
        _ => Ok(Box::new(whole)),
    }
}

/// The bytes that may still be read. The reader inside the archive and the loop outside share it.
#[derive(Clone)]
struct Budget {
    total: Rc<Cell<u64>>,
    /// Set while the archive reads the headers in front of an entry.
    head: Rc<Cell<Option<u64>>>,
    refused: Rc<Cell<Option<&'static str>>>,
}

impl Budget {
    fn new(total: u64) -> Budget {
        Budget { total: Rc::new(Cell::new(total)), head: Rc::default(), refused: Rc::default() }
    }
}

struct Budgeted<R> {
    inner: R,
    budget: Budget,
}

impl<R: Read> Read for Budgeted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)? as u64;
        let refuse = |what| {
            self.budget.refused.set(Some(what));
            Err(io::Error::other(what))
        };
        match self.budget.total.get().checked_sub(count) {
            Some(left) => self.budget.total.set(left),
            None => return refuse("the layer expands beyond the limit (a compression bomb?)"),
        }
        match self.budget.head.get().map(|left| left.checked_sub(count)) {
            None => {}
            Some(Some(left)) => self.budget.head.set(Some(left)),
            Some(None) => return refuse("an entry's name or attributes exceed 1 MiB"),
        }
        Ok(count as usize)
    }
}

/// Returns the fault for an archive that cannot be read: a storage fault if the machine's disk failed.
fn damaged(error: io::Error) -> Fault {
    Fault::data(format!("damaged archive: {error}")).or_machines()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LIMITS: Limits =
        Limits { entries_max: 50, extracted_bytes_max: 10_000, expanded_bytes_max: 4 << 20 };

    /// Makes an entry with any name and type, since `tar::Builder` refuses to write bad ones.
    fn entry(name: &str, kind: tar::EntryType, content: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        header.set_link_name("/etc/passwd").unwrap();
        header.set_cksum();
        let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
        [header.as_bytes().as_slice(), content, &padding].concat()
    }

    fn file(name: &str, content: &[u8]) -> Vec<u8> {
        entry(name, tar::EntryType::Regular, content)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Unpacks layers and returns `name=content` of every file below the folder, sorted.
    fn unpack(layers: &[Vec<u8>]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let mut unpacker = Unpacker::new(folder.path(), LIMITS);
        for layer in layers {
            unpacker.layer(&layer[..], "layer")?;
        }
        let mut found = Vec::new();
        let mut open = vec![folder.path().to_path_buf()];
        while let Some(directory) = open.pop() {
            for item in fs::read_dir(directory).unwrap() {
                let path = item.unwrap().path();
                match path.is_dir() {
                    true => open.push(path),
                    false => {
                        let name = path.strip_prefix(folder.path()).unwrap().display().to_string();
                        found.push(format!("{name}={}", fs::read_to_string(&path).unwrap()));
                    }
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// A disk that fails in the middle of a layer.
    struct Failing<'a>(&'a [u8]);

    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::from_raw_os_error(libc::EIO)),
                count => Ok(count),
            }
        }
    }

    #[test]
    fn a_layer_that_the_machine_cannot_read_is_not_damaged() {
        let layer = file("data/a", &[b'a'; 2000]);
        for at in [0, 100, 512, 1000, 2560] {
            let folder = tempfile::tempdir().unwrap();
            let read = Unpacker::new(folder.path(), LIMITS).layer(Failing(&layer[..at]), "layer");
            let fault = read.unwrap_err();
            assert_eq!(fault.kind, Kind::Storage, "{at}: {fault}");
        }
    }

    #[test]
    fn files_under_data_are_taken_and_the_rest_of_a_base_image_is_skipped() {
        let layer = [
            entry("bin/sh", tar::EntryType::Symlink, b""),
            entry("dev/null", tar::EntryType::Char, b""),
            file("database/x", b"no"),
            entry("./data/", tar::EntryType::Directory, b""),
            file("data/a", b"one"),
            file("./data/sub/b", &[b'x'; 700]),
            vec![0; 1024],
        ]
        .concat();
        let expected = vec!["a=one".to_string(), format!("sub/b={}", "x".repeat(700))];
        assert_eq!(unpack(std::slice::from_ref(&layer)).unwrap(), expected, "plain tar");
        assert_eq!(unpack(&[gzip(&layer)]).unwrap(), expected, "gzip");
        let halves = [gzip(&layer[..1000]), gzip(&layer[1000..])].concat();
        assert_eq!(unpack(&[halves]).unwrap(), expected, "gzip in several members");
    }

    #[test]
    fn later_layers_replace_and_hide() {
        let first = [file("data/a", b"1"), file("data/b", b"1"), file("data/c/d", b"1")].concat();
        let second = [file("data/a", b"22"), file("data/.wh.b", b""), file("data/.wh.missing", b"")].concat();
        assert_eq!(unpack(&[first.clone(), second]).unwrap(), ["a=22", "c/d=1"]);
        let opaque = [file("data/.wh..wh..opq", b""), file("data/z", b"3")].concat();
        assert_eq!(unpack(&[first, opaque]).unwrap(), ["z=3"]);
    }

    #[test]
    fn an_archive_at_its_limits_is_taken_and_one_beyond_is_refused() {
        let many =
            |count: usize| (0..count).map(|n| file(&format!("data/{n}"), b"")).collect::<Vec<_>>().concat();
        assert_eq!(unpack(&[many(50)]).unwrap().len(), 50);
        assert!(unpack(&[many(25), many(26)]).is_err(), "entries of all layers count");
        let sized = |name: &str, bytes| file(name, &vec![b'a'; bytes]);
        assert_eq!(unpack(&[sized("data/a", 10_000)]).unwrap().len(), 1);
        assert_eq!(unpack(&[sized("data/a", 6_000), sized("data/b", 4_000)]).unwrap().len(), 2);
        assert!(
            unpack(&[sized("data/a", 6_000), sized("data/b", 4_001)]).is_err(),
            "bytes of all layers count"
        );
        // Bytes outside of `data` count too.
        let skipped = gzip(&sized("other", 3 << 20));
        assert!(unpack(std::slice::from_ref(&skipped)).unwrap().is_empty());
        assert!(unpack(&[skipped.clone(), skipped]).is_err(), "unpacked bytes of all layers count");
    }

    #[test]
    fn hostile_archives_are_data_faults() {
        let pax = |name: &str, records: &[u8]| {
            [entry("x", tar::EntryType::XHeader, records), file(name, b"x")].concat()
        };
        let cases: &[(&str, Vec<u8>)] = &[
            ("symlink", entry("data/a", tar::EntryType::Symlink, b"")),
            ("hard link", entry("data/a", tar::EntryType::Link, b"")),
            ("device", entry("data/a", tar::EntryType::Char, b"")),
            ("pipe", entry("data/a", tar::EntryType::Fifo, b"")),
            ("data is a link", entry("data", tar::EntryType::Symlink, b"")),
            ("data is a file", file("data", b"x")),
            ("parent", file("data/../../a", b"x")),
            ("parent elsewhere", file("../a", b"x")),
            ("absolute", file("/data/a", b"x")),
            ("parent by PAX", pax("data/a", b"22 path=../../../evil\n")),
            ("file, then folder", [file("data/a", b"x"), file("data/a/b", b"x")].concat()),
            ("truncated", file("data/a", &[1; 600])[..900].to_vec()),
            ("bad checksum", {
                let mut bytes = file("data/a", b"x");
                bytes[150] ^= 1;
                bytes
            }),
            ("not a tar", b"<html>login</html>".repeat(60)),
            ("too many entries", file("data/a", b"").repeat(51)),
            ("too large", file("data/a", &[0; 10_001])),
            ("huge declared size", {
                let mut header = tar::Header::new_gnu();
                header.set_path("data/a").unwrap();
                header.set_entry_type(tar::EntryType::Regular);
                header.set_size(1 << 40);
                header.set_cksum();
                header.as_bytes().to_vec()
            }),
            ("bomb outside data", gzip(&file("zeros", &vec![0; 8 << 20]))),
            (
                "bomb of a name",
                gzip(&entry("././@LongLink", tar::EntryType::GNULongName, &vec![b'a'; 3 << 20])),
            ),
            ("broken gzip", gzip(&file("data/a", b"x"))[..40].to_vec()),
            ("zstd", vec![0x28, 0xb5, 0x2f, 0xfd, 0]),
        ];
        for (name, layer) in cases {
            let fault = unpack(std::slice::from_ref(layer)).expect_err(name);
            assert_eq!(fault.kind, Kind::Data, "{name}: {fault}");
            assert!(fault.message.starts_with("layer: "), "{name}: {fault}");
        }
    }

    #[test]
    fn names_from_the_archive_cannot_write_to_the_terminal() {
        let fault = unpack(&[entry("data/\x1b[31mred", tar::EntryType::Symlink, b"")]).unwrap_err();
        assert!(!fault.message.contains('\x1b'), "{fault}");
    }
}
