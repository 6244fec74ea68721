//! Arrow IPC: files (feather) and streams (as `datasets` saves them), record batch by record batch.
//!
//! The decoder reserves the sizes that a message declares. Every message is therefore checked first: ranges inside
//! the file, counts and unpacked sizes below a limit. Like parquet's decoder, it runs behind `guarded`.

use super::packing::Input;
use super::{BATCH_ROWS, Container, OnBatch, Rows, guarded, indices, text};
use crate::fault::{Fault, Result};
use crate::interrupt;
use ::arrow::array::ArrayRef;
use ::arrow::buffer::Buffer;
use ::arrow::datatypes::Schema;
use ::arrow::ipc::convert::try_fb_to_schema;
use ::arrow::ipc::reader::FileDecoder;
use ::arrow::ipc::{
    Block, Message, MessageHeader, MetadataVersion, RecordBatch, root_as_footer, root_as_message,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// LIMIT: bytes of one record batch, stored and unpacked; writers aim at megabytes.
const BATCH_BYTES_MAX: u64 = 4 << 30;
/// LIMIT: rows, values and list items of one batch.
const VALUES_MAX: i64 = 100_000_000;
/// LIMIT: bytes of a message's metadata, and of a file's footer.
const METADATA_BYTES_MAX: u64 = 64 << 20;
const COLUMNS_MAX: usize = 10_000;
const FILE_MAGIC: &[u8] = b"ARROW1";
const CONTINUATION: [u8; 4] = [0xff; 4];

/// The container.
pub static CONTAINER: Container = Container {
    name: "arrow",
    title: "an Arrow IPC file",
    endings: &["arrow", "feather", "ipc"],
    is: |head| head.starts_with(FILE_MAGIC) || head.starts_with(&CONTINUATION),
    may_begin: |_| false,
    open: |input| Ok(Box::new(Batches::open(input)?)),
};

type Checked<T> = std::result::Result<T, String>;

/// A file whose messages were checked.
struct Batches {
    input: Input,
    schema: Arc<Schema>,
    version: MetadataVersion,
    dictionaries: Vec<Block>,
    batches: Vec<Block>,
    rows: u64,
}

impl Batches {
    fn open(input: Input) -> Result<Batches> {
        let input = input.seekable()?;
        let mut head = vec![0; FILE_MAGIC.len().min(input.bytes as usize)];
        input.file.read_exact_at(&mut head, 0).map_err(|error| input.failed(&error))?;
        let is_file = head == FILE_MAGIC;
        let found = guarded(|| if is_file { from_footer(&input) } else { from_stream(&input) });
        let found = found.map_err(|problem| damaged(&input.name, &problem))?;
        let columns = found.schema.fields().len();
        if columns > COLUMNS_MAX {
            return Err(Fault::data(format!("{}: {columns} columns, limit {COLUMNS_MAX}", input.name)));
        }
        let Found { schema, version, dictionaries, batches, rows } = found;
        Ok(Batches { schema: Arc::new(schema), version, dictionaries, batches, rows, input })
    }

    fn read_batch(
        &self,
        decoder: &FileDecoder,
        block: &Block,
        places: &[usize],
        each: &mut OnBatch,
    ) -> Checked<Result<()>> {
        let bytes = block_bytes(&self.input.file, block)?;
        let Some(batch) = decoder.read_record_batch(block, &bytes).map_err(text)? else { return Ok(Ok(())) };
        for from in (0..batch.num_rows()).step_by(BATCH_ROWS) {
            let part = batch.slice(from, BATCH_ROWS.min(batch.num_rows() - from));
            let arrays: Vec<ArrayRef> = places.iter().map(|&place| part.column(place).clone()).collect();
            if let Err(fault) = each(&arrays) {
                return Ok(Err(fault));
            }
        }
        Ok(Ok(()))
    }
}

impl Rows for Batches {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn count(&self) -> Option<u64> {
        Some(self.rows)
    }

    fn read(&self, names: &[String], each: &mut OnBatch) -> Result<()> {
        let wanted = indices(&self.schema, names)?;
        // The decoder returns columns in the order of the schema.
        let mut projection = wanted.clone();
        projection.sort_unstable();
        projection.dedup();
        let place = |index: &usize| projection.binary_search(index).expect("each is among them");
        let places: Vec<usize> = wanted.iter().map(place).collect();
        let mut decoder =
            FileDecoder::new(self.schema.clone(), self.version).with_projection(projection.clone());
        for block in &self.dictionaries {
            let read = guarded(|| {
                let bytes = block_bytes(&self.input.file, block)?;
                decoder.read_dictionary(block, &bytes).map_err(text)
            });
            read.map_err(|problem| damaged(&self.input.name, &problem))?;
        }
        for (index, block) in self.batches.iter().enumerate() {
            interrupt::check()?;
            let place = format!("{}: record batch {index}", self.input.name);
            match guarded(|| self.read_batch(&decoder, block, &places, each)) {
                Err(problem) => return Err(damaged(&place, &problem)),
                Ok(read) => read.map_err(|fault| fault.at(place))?,
            }
        }
        Ok(())
    }
}

fn damaged(place: &str, problem: &str) -> Fault {
    Fault::data(format!("{place}: the Arrow data is damaged or not supported: {problem}"))
        .help("check the file against its SHA-256, or export it again")
        .or_machines()
}

/// The result of checking all messages.
struct Found {
    schema: Schema,
    version: MetadataVersion,
    dictionaries: Vec<Block>,
    batches: Vec<Block>,
    rows: u64,
}

/// Reads a file, which ends with a footer that lists its messages.
fn from_footer(input: &Input) -> Checked<Found> {
    let tail_bytes = 4 + FILE_MAGIC.len() as u64;
    let tail_at = input.bytes.checked_sub(tail_bytes).ok_or("the file is cut off")?;
    let tail = bytes_at(&input.file, tail_at, tail_bytes)?;
    if !tail.ends_with(FILE_MAGIC) {
        return Err("the file does not end with ARROW1: it is cut off".into());
    }
    let length = u64::from(u32::from_le_bytes(tail[..4].try_into().expect("four bytes")));
    let at = tail_at.checked_sub(length).filter(|_| length <= METADATA_BYTES_MAX);
    let bytes = bytes_at(&input.file, at.ok_or("its footer leaves the file")?, length)?;
    let footer = root_as_footer(&bytes).map_err(|error| format!("footer: {error}"))?;
    let schema = try_fb_to_schema(footer.schema().ok_or("it has no schema")?).map_err(text)?;
    let mut found = Found {
        schema,
        version: footer.version(),
        dictionaries: footer
            .dictionaries()
            .into_iter()
            .flat_map(|list| list.iter().copied().collect::<Vec<_>>())
            .collect(),
        batches: footer
            .recordBatches()
            .into_iter()
            .flat_map(|list| list.iter().copied().collect::<Vec<_>>())
            .collect(),
        rows: 0,
    };
    for block in &found.dictionaries {
        check_block(input, block)?;
    }
    for block in &found.batches {
        found.rows += check_block(input, block)?;
    }
    Ok(found)
}

/// Reads a stream: messages one after the other, the schema first, until an empty message or the file's end.
fn from_stream(input: &Input) -> Checked<Found> {
    let mut found: Option<Found> = None;
    let mut at = 0;
    while at < input.bytes {
        let (metadata_bytes, bytes) = match message_bytes(input, at)? {
            Some(found) => found,
            None => break,
        };
        let message = message(&bytes)?;
        let body = body_bytes(&message)?;
        let block = Block::new(at as i64, metadata_bytes as i32, body as i64);
        match (message.header_type(), &mut found) {
            (MessageHeader::Schema, None) => {
                let schema =
                    try_fb_to_schema(message.header_as_schema().ok_or("its first message has no schema")?)
                        .map_err(text)?;
                let (dictionaries, batches) = (Vec::new(), Vec::new());
                found = Some(Found { schema, version: message.version(), dictionaries, batches, rows: 0 });
            }
            (MessageHeader::DictionaryBatch, Some(found)) => {
                check_block(input, &block)?;
                if !found.batches.is_empty() {
                    return Err("its dictionaries change between record batches".into());
                }
                found.dictionaries.push(block);
            }
            (MessageHeader::RecordBatch, Some(found)) => {
                found.rows += check_block(input, &block)?;
                found.batches.push(block);
            }
            (kind, _) => {
                return Err(format!("a message {} at byte {at}", kind.variant_name().unwrap_or("?")));
            }
        }
        at += metadata_bytes + body;
    }
    found.ok_or_else(|| "it holds no schema".into())
}

/// Returns the metadata of the message at a place, and its length with its prefix; `None` at the end of the stream.
fn message_bytes(input: &Input, at: u64) -> Checked<Option<(u64, Vec<u8>)>> {
    let prefix = bytes_at(&input.file, at, 8.min(input.bytes.saturating_sub(at)))?;
    if prefix.len() < 8 || !prefix.starts_with(&CONTINUATION) {
        return Err(format!("no message at byte {at}"));
    }
    let length = u64::from(u32::from_le_bytes(prefix[4..].try_into().expect("four bytes")));
    if length == 0 {
        return Ok(None);
    }
    if length > METADATA_BYTES_MAX || at + 8 + length > input.bytes {
        return Err(format!("the message at byte {at} leaves the file"));
    }
    Ok(Some((8 + length, bytes_at(&input.file, at + 8, length)?)))
}

fn message(bytes: &[u8]) -> Checked<Message<'_>> {
    root_as_message(bytes).map_err(|error| format!("a message: {error}"))
}

fn body_bytes(message: &Message) -> Checked<u64> {
    u64::try_from(message.bodyLength())
        .ok()
        .filter(|&bytes| bytes <= BATCH_BYTES_MAX)
        .ok_or_else(|| format!("a batch of {} bytes, limit {BATCH_BYTES_MAX}", message.bodyLength()))
}

/// Checks a block's message before the decoder sees it. Returns its number of rows.
fn check_block(input: &Input, block: &Block) -> Checked<u64> {
    let outside = || format!("the message at byte {} leaves the file", block.offset());
    let (at, metadata, body) = (block.offset(), i64::from(block.metaDataLength()), block.bodyLength());
    if at < 0
        || metadata < 8
        || metadata as u64 > METADATA_BYTES_MAX
        || body < 0
        || body as u64 > BATCH_BYTES_MAX
    {
        return Err(outside());
    }
    let body_at = (at as u64).checked_add(metadata as u64).ok_or_else(outside)?;
    if body_at.checked_add(body as u64).is_none_or(|end| end > input.bytes) {
        return Err(outside());
    }
    let bytes = bytes_at(&input.file, at as u64, metadata as u64)?;
    let start = if bytes.starts_with(&CONTINUATION) { 8 } else { 4 };
    let message = message(&bytes[start..])?;
    if message.bodyLength() != body {
        return Err(format!("the message at byte {at} has {} bytes, expected {body}", message.bodyLength()));
    }
    let dictionary = message.header_as_dictionary_batch().and_then(|batch| batch.data());
    match message.header_as_record_batch().or(dictionary) {
        Some(batch) => check_batch(&input.file, &batch, body_at, body as u64),
        None => Err(format!("the message at byte {at} holds no rows")),
    }
}

fn check_batch(file: &File, batch: &RecordBatch, body_at: u64, body: u64) -> Checked<u64> {
    let rows = batch.length();
    let counts = batch
        .nodes()
        .into_iter()
        .flat_map(|nodes| nodes.iter().map(|node| node.length()).collect::<Vec<_>>());
    if let Some(count) = counts.chain([rows]).find(|count| !(0..=VALUES_MAX).contains(count)) {
        return Err(format!("a batch of {count} values, limit {VALUES_MAX}"));
    }
    let mut unpacked = 0;
    for buffer in batch.buffers().into_iter().flat_map(|buffers| buffers.iter().copied().collect::<Vec<_>>())
    {
        let (at, length) = (u64::try_from(buffer.offset()), u64::try_from(buffer.length()));
        let (Ok(at), Ok(length)) = (at, length) else { return Err("a buffer of negative size".into()) };
        if at.checked_add(length).is_none_or(|end| end > body) {
            return Err("a buffer leaves its record batch".into());
        }
        unpacked += match batch.compression() {
            Some(_) if length >= 8 => {
                let bytes = bytes_at(file, body_at + at, 8)?;
                match i64::from_le_bytes(bytes.try_into().expect("eight bytes")) {
                    -1 => length - 8,
                    size => u64::try_from(size).map_err(|_| "a buffer of negative size")?,
                }
            }
            _ => length,
        };
        if unpacked > BATCH_BYTES_MAX {
            return Err(format!("a batch that unpacks to {unpacked} bytes, limit {BATCH_BYTES_MAX}"));
        }
    }
    Ok(rows as u64)
}

fn block_bytes(file: &File, block: &Block) -> Checked<Buffer> {
    let bytes = block.metaDataLength() as u64 + block.bodyLength() as u64;
    Ok(Buffer::from_vec(bytes_at(file, block.offset() as u64, bytes)?))
}

fn bytes_at(file: &File, at: u64, bytes: u64) -> Checked<Vec<u8>> {
    let mut buffer = vec![0; bytes as usize];
    file.read_exact_at(&mut buffer, at)
        .map_err(|error| format!("cannot read {bytes} bytes at {at}: {error}"))?;
    Ok(buffer)
}
