//! A seat -> a connection between rank 0 and every other rank, each of which has proved that it belongs to the run.
//!
//! Rank 0 listens, the others call, and all go on when the last one is there. Rank 0 listens until the end, because the
//! process that started a rank reports there why the rank ended.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::ranks::Place;
use crate::ranks::frame::{self, Frame, GREETING_BYTES_MAX, What};
use crate::ranks::place::{Environment, Meeting, Seat};
use crate::words;

/// Variable by which a launcher says that standard input is the socket that rank 0 listens on.
pub const LISTENER: &str = "HONE_RANKS_LISTENER";
/// Variable with the number of the process that started a rank.
pub const PARENT: &str = "HONE_RANKS_PARENT";
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Time between two attempts to reach rank 0, which may not be there yet.
const CALL_INTERVAL: Duration = Duration::from_millis(200);
/// LIMIT: time for which a port may still be taken by a process that is ending.
const PORT_MAX: Duration = Duration::from_secs(10);
/// LIMIT: a greeting is a few hundred bytes. A stranger that sends one now and then takes no longer either.
const GREETING_MAX: Duration = Duration::from_secs(5);
/// LIMIT: greetings that are read at the same time.
const GREETINGS_MAX: usize = 256;
/// Ranks that a message names.
const RANKS_SHOWN: usize = 16;

/// Times of the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Time until all ranks are there (`HONE_RANKS_WAIT`).
    pub wait: Duration,
    /// Time after which a rank that sends nothing counts as dead (`HONE_RANKS_SILENCE`).
    pub silence: Duration,
    /// Time after which a rank that does not come to a call of training, for which the others wait, counts as hanging
    /// (`HONE_RANKS_TIMEOUT`).
    pub hang: Duration,
}

impl Limits {
    /// Reads the times.
    ///
    /// # Errors
    /// Config: a variable is no number of seconds from 1.
    pub fn read(environment: Environment) -> Result<Limits> {
        let seconds = |name: &str, default: u64| match environment(name).filter(|text| !text.is_empty()) {
            None => Ok(Duration::from_secs(default)),
            Some(text) => match text.parse::<u64>() {
                Ok(seconds @ 1..=1_000_000) => Ok(Duration::from_secs(seconds)),
                _ => Err(Fault::config(format!("{name}={text}: expected a number of seconds from 1"))),
            },
        };
        Ok(Limits {
            wait: seconds("HONE_RANKS_WAIT", 600)?,
            silence: seconds("HONE_RANKS_SILENCE", 30)?,
            hang: seconds("HONE_RANKS_TIMEOUT", 600)?,
        })
    }
}

/// A rank's description of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    rank: usize,
    world: usize,
    local_rank: usize,
    local_world: usize,
    host: String,
    process: u32,
}

impl Hello {
    fn of(place: Place) -> Hello {
        let Place { rank, world, local_rank, local_world } = place;
        Hello { rank, world, local_rank, local_world, host: host(), process: std::process::id() }
    }

    /// Returns the rank in messages.
    pub fn name(&self) -> String {
        format!("rank {} of {} ({}, process {})", self.rank, self.world, self.host, self.process)
    }
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".into(),
        name => name.into(),
    }
}

/// A connection that was made, with its first frame.
pub struct Greeting {
    frame: Frame,
    stream: TcpStream,
}

impl Greeting {
    /// Returns the rank that ended, and why, if the caller is the process that started it.
    pub fn ended(&self) -> Option<(usize, Fault)> {
        (self.frame.what == What::Ended).then(|| (self.frame.number as usize, self.frame.fault()))
    }
}

/// The connections of a rank: those of rank 0 to all others, or the one to rank 0.
pub struct Met {
    /// The ranks at the other ends, and their connections.
    pub peers: Vec<(usize, String, TcpStream)>,
    /// Later callers of rank 0.
    pub callers: Option<Receiver<Greeting>>,
}

/// Meets the other ranks.
///
/// # Errors
/// Device: they were started with another number of ranks, or do not come in time. Interrupted: a signal came first. If
/// a rank ended before, its fault.
pub fn meet(seat: &Seat, limits: &Limits, environment: Environment) -> Result<Met> {
    match seat.place.leads() {
        true => take_all(seat, limits, listener(&seat.meeting, environment)?),
        false => call(seat, limits),
    }
}

/// Returns the socket that rank 0 listens on: the launcher's, or the first free port.
fn listener(meeting: &Meeting, environment: Environment) -> Result<TcpListener> {
    let failed = |error: io::Error| {
        Fault::new(Kind::Device, format!("rank 0 cannot listen on port {:?}: {error}", meeting.ports))
            .help("another process listens there: name a free port in HONE_MASTER_PORT on every rank")
    };
    if environment(LISTENER).is_some_and(|place| place == "stdin") {
        return Ok(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?.into());
    }
    if let [port] = meeting.ports.as_slice() {
        return listen_soon(&meeting.host, *port).map_err(failed);
    }
    let mut last = io::Error::other("no port is named");
    for &port in &meeting.ports {
        match listen(&meeting.host, port) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// Does `listen` on the only port that is named. A rank 0 that was killed may still hold it for a moment.
pub fn listen_soon(host: &str, port: u16) -> io::Result<TcpListener> {
    let until = Instant::now() + PORT_MAX;
    loop {
        match listen(host, port) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                if interrupt::requested() {
                    return Err(error);
                }
                std::thread::sleep(CALL_INTERVAL);
            }
            ended => return ended,
        }
    }
}

/// Listens for callers of this name: on loopback only if no other machine can be meant.
pub fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let is_loopback =
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if is_loopback {
        return TcpListener::bind((host, port));
    }
    let any_ipv4 = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
    // The system may keep IPv4 callers from a socket of IPv6.
    if (host, port).to_socket_addrs().is_ok_and(|mut all| all.all(|address| address.is_ipv4())) {
        return any_ipv4();
    }
    // A machine without IPv6 takes the second.
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| any_ipv4())
}

fn take_all(seat: &Seat, limits: &Limits, listener: TcpListener) -> Result<Met> {
    let callers = greet(listener, seat.meeting.token.clone())
        .map_err(|error| Fault::machine("start the thread that takes the ranks' calls", &error))?;
    let world = seat.place.world;
    let mut there: Vec<Option<(Hello, TcpStream)>> = (0..world).map(|_| None).collect();
    match wait_for_all(seat.place, limits, &callers, &mut there) {
        Ok(()) => {}
        Err(fault) => {
            for (_, stream) in there.iter_mut().flatten() {
                let _ = Frame::of(What::End, 0, &fault).write(stream);
            }
            return Err(fault);
        }
    }
    let peers = there.into_iter().flatten().map(|(hello, stream)| (hello.rank, hello.name(), stream));
    Ok(Met { peers: peers.collect(), callers: Some(callers) })
}

fn wait_for_all(
    place: Place,
    limits: &Limits,
    callers: &Receiver<Greeting>,
    there: &mut [Option<(Hello, TcpStream)>],
) -> Result<()> {
    let until = Instant::now() + limits.wait;
    while there.iter().flatten().count() + 1 < place.world {
        interrupt::check()?;
        match callers.recv_timeout(LOOK_INTERVAL) {
            Ok(greeting) => match greeting.ended() {
                Some((rank, fault)) => {
                    return Err(of_rank(&format!("rank {rank} of {}", place.world), fault));
                }
                // A rank that was started again takes the place of the one before.
                None => {
                    let (hello, stream) = admit(greeting, place)?;
                    let rank = hello.rank;
                    there[rank] = Some((hello, stream));
                }
            },
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Fault::internal("rank 0 accepts no more connections"));
            }
        }
        if Instant::now() >= until {
            let missing: Vec<usize> = (1..place.world).filter(|rank| there[*rank].is_none()).collect();
            return Err(late(
                &format!("ranks {} of {} did not connect", words::list(&missing, RANKS_SHOWN), place.world),
                limits,
            ));
        }
    }
    for (hello, stream) in there.iter_mut().flatten() {
        Frame::bare(What::Welcome).write(stream).map_err(|error| {
            Fault::new(Kind::Device, format!("{} ended before all ranks were there: {error}", hello.name()))
        })?;
    }
    Ok(())
}

fn late(what: &str, limits: &Limits) -> Fault {
    Fault::new(Kind::Device, format!("{what} within {} s", limits.wait.as_secs())).help(
        "see why they have not started (a pod without a node, another address of rank 0, a closed port); HONE_RANKS_WAIT \
         names another number of seconds",
    )
}

/// Returns a caller that belongs to the run. Another caller receives the reason why it does not.
fn admit(greeting: Greeting, place: Place) -> Result<(Hello, TcpStream)> {
    let Greeting { frame, mut stream } = greeting;
    match hello(&frame, place) {
        Ok(hello) => Ok((hello, stream)),
        Err(fault) => {
            let _ = Frame::of(What::End, 0, &fault).write(&mut stream);
            Err(fault)
        }
    }
}

fn hello(frame: &Frame, place: Place) -> Result<Hello> {
    let unread = || Fault::internal("the first message of a rank cannot be read");
    let hello: Hello = serde_json::from_slice(&frame.body).map_err(|_| unread())?;
    if hello.world != place.world {
        return Err(Fault::new(
            Kind::Device,
            format!(
                "{} was started among {} ranks, and rank 0 ({}, process {}) among {}",
                hello.name(),
                hello.world,
                host(),
                std::process::id(),
                place.world
            ),
        )
        .help("start all ranks with the same number of machines and of GPUs on each"));
    }
    match (1..hello.world).contains(&hello.rank) {
        true => Ok(hello),
        false => Err(Fault::config(format!(
            "{} connects to rank 0, but has the number of rank 0 itself",
            hello.name()
        ))
        .help("give every process a rank of its own")),
    }
}

/// Takes calls in a thread of its own, and passes on those that belong to the run.
fn greet(listener: TcpListener, token: String) -> io::Result<Receiver<Greeting>> {
    let (sender, receiver) = channel();
    let open = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    std::thread::Builder::new().name("ranks: calls".into()).spawn(move || {
        use std::sync::atomic::Ordering;
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                std::thread::sleep(LOOK_INTERVAL);
                continue;
            };
            if open.fetch_add(1, Ordering::SeqCst) >= GREETINGS_MAX {
                open.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (sender, token, open) = (sender.clone(), token.clone(), open.clone());
            std::thread::spawn(move || {
                // A stranger's call is closed without a word.
                let _ = take(stream, &token, &sender, GREETING_MAX);
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    })?;
    Ok(receiver)
}

fn take(stream: TcpStream, token: &str, to: &Sender<Greeting>, longest: Duration) -> io::Result<()> {
    let mut timed = Timed { stream: &stream, until: Instant::now() + longest };
    frame::prove(&mut timed, token, false)?;
    let frame = Frame::read(&mut timed, GREETING_BYTES_MAX)?;
    stream.set_read_timeout(None)?;
    to.send(Greeting { frame, stream }).map_err(io::Error::other)
}

/// A connection that must be done at a time, however often bytes come.
struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Calls rank 0 until it takes the call and all ranks are there.
fn call(seat: &Seat, limits: &Limits) -> Result<Met> {
    let until = Instant::now() + limits.wait;
    let hello = serde_json::to_vec(&Hello::of(seat.place)).expect("texts and numbers");
    loop {
        let called = reach(&seat.meeting, &Frame { what: What::Hello, number: 0, body: hello.clone() });
        let last = match called.and_then(|stream| welcomed(stream, until)) {
            Ok(Ok(stream)) => {
                let name = format!("rank 0 of {} ({})", seat.place.world, seat.meeting.host);
                return Ok(Met { peers: vec![(0, name, stream)], callers: None });
            }
            Ok(Err(fault)) => return Err(fault),
            Err(error) => error.to_string(),
        };
        interrupt::check()?;
        if Instant::now() >= until {
            let Meeting { host, ports, .. } = &seat.meeting;
            let what =
                format!("rank {} did not reach rank 0 at {host}, port {}: {last}", seat.place.rank, ports[0]);
            return Err(late(&what, limits));
        }
        std::thread::sleep(CALL_INTERVAL);
    }
}

/// Returns a connection to rank 0 of this run, with its first frame sent.
fn reach(meeting: &Meeting, first: &Frame) -> io::Result<TcpStream> {
    let mut last = io::Error::other("no port is named");
    for &port in &meeting.ports {
        let addresses: Vec<SocketAddr> = (meeting.host.as_str(), port).to_socket_addrs()?.collect();
        for address in addresses {
            // A signal does not wait for all ports.
            if interrupt::requested() {
                return Err(last);
            }
            match reach_at(address, &meeting.token, first) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
    }
    Err(last)
}

fn reach_at(address: SocketAddr, token: &str, first: &Frame) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, GREETING_MAX)?;
    let mut timed = Timed { stream: &stream, until: Instant::now() + GREETING_MAX };
    frame::prove(&mut timed, token, true)?;
    first.write(&mut timed)?;
    Ok(stream)
}

/// Waits until rank 0 says that all are there. The inner fault is rank 0's; an error means that it is gone.
fn welcomed(stream: TcpStream, until: Instant) -> io::Result<Result<TcpStream>> {
    stream.set_read_timeout(Some(LOOK_INTERVAL))?;
    loop {
        match stream.peek(&mut [0]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => break,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
        if let Err(fault) = interrupt::check() {
            return Ok(Err(fault));
        }
        if Instant::now() >= until {
            return Err(io::Error::other("rank 0 waits for other ranks"));
        }
    }
    let mut timed = Timed { stream: &stream, until: Instant::now() + GREETING_MAX };
    let frame = Frame::read(&mut timed, GREETING_BYTES_MAX)?;
    stream.set_read_timeout(None)?;
    match frame.what {
        What::Welcome => Ok(Ok(stream)),
        What::End => Ok(Err(frame.fault())),
        other => Err(io::Error::other(format!("rank 0 said {other:?} first"))),
    }
}

/// Tells rank 0 why a rank ended; called by the process that started it. Nothing follows if rank 0 is gone too.
pub fn tell_end(meeting: &Meeting, rank: usize, fault: &Fault) {
    let _ = reach(meeting, &Frame::of(What::Ended, rank as u64, fault));
}

/// Returns a rank's fault as the fault of the run. It keeps its kind if somebody must act or a signal came; any other
/// end of a rank is that of a device, after which a retry can help.
pub fn of_rank(name: &str, fault: Fault) -> Fault {
    let keeps =
        !fault.kind.retry_helps() || matches!(fault.kind, Kind::Interrupted | Kind::InterruptedUnsaved);
    let kind = if keeps { fault.kind } else { Kind::Device };
    Fault { kind, ..fault }.at(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(rank: usize, world: usize, port: u16, token: &str) -> Seat {
        let place = Place { rank, world, local_rank: rank, local_world: world };
        Seat { place, meeting: Meeting { host: "127.0.0.1".into(), ports: vec![port], token: token.into() } }
    }

    const LIMITS: Limits = Limits {
        wait: Duration::from_secs(20),
        silence: Duration::from_secs(30),
        hang: Duration::from_secs(30),
    };
    const SHORT: Limits = Limits { wait: Duration::from_millis(300), ..LIMITS };

    fn bound() -> (TcpListener, u16) {
        let listener = listen("127.0.0.1", 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    #[test]
    fn ranks_meet_in_any_order_and_strangers_do_not_count() {
        let (listener, port) = bound();
        std::thread::scope(|scope| {
            let late = scope.spawn(move || call(&seat(2, 3, port, "t"), &LIMITS).map(|met| met.peers.len()));
            scope.spawn(move || call(&seat(1, 3, port, "another run's"), &SHORT).map(drop).unwrap_err());
            // It says nothing at all.
            let silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let first = scope.spawn(move || take_all(&seat(0, 3, port, "t"), &LIMITS, listener));
            let second =
                scope.spawn(move || call(&seat(1, 3, port, "t"), &LIMITS).map(|met| met.peers.len()));
            let met = first.join().unwrap().unwrap();
            assert_eq!(met.peers.iter().map(|peer| peer.0).collect::<Vec<_>>(), [1, 2]);
            assert!(met.peers[1].1.starts_with("rank 2 of 3 ("), "{}", met.peers[1].1);
            assert_eq!((late.join().unwrap().unwrap(), second.join().unwrap().unwrap()), (1, 1));
            drop(silent);
        });
    }

    /// A stranger that sends a byte now and then does not hold its place.
    #[test]
    fn a_slow_stranger_is_sent_away_in_time() {
        let (listener, port) = bound();
        let (sender, _receiver) = channel();
        let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (taken, _) = listener.accept().unwrap();
        std::thread::scope(|scope| {
            let longest = Duration::from_millis(400);
            let ended = scope.spawn(move || take(taken, "t", &sender, longest).unwrap_err().kind());
            // It would take three seconds to say all of an opening.
            let sent = (0..60).take_while(|_| {
                std::thread::sleep(Duration::from_millis(50));
                stranger.write_all(b"h").is_ok()
            });
            let sent = sent.count();
            assert!(matches!(ended.join().unwrap(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock));
            assert!(sent < 60, "the connection was closed");
        });
    }

    #[test]
    fn an_address_of_ipv4_is_listened_to_by_ipv4() {
        assert!(listen("192.0.2.1", 0).unwrap().local_addr().unwrap().is_ipv4());
        assert_eq!(listen("127.0.0.1", 0).unwrap().local_addr().unwrap().ip(), Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn a_port_that_is_still_taken_is_waited_for() {
        let (before, port) = bound();
        std::thread::scope(|scope| {
            let next = scope.spawn(move || listen_soon("127.0.0.1", port));
            std::thread::sleep(CALL_INTERVAL * 2);
            assert!(!next.is_finished(), "the port is taken");
            drop(before);
            assert_eq!(next.join().unwrap().unwrap().local_addr().unwrap().port(), port);
        });
    }

    #[test]
    fn who_does_not_come_is_named() {
        let (listener, port) = bound();
        let fault = take_all(&seat(0, 3, port, "t"), &SHORT, listener).map(drop).unwrap_err();
        assert_eq!(fault.message, "ranks 1, 2 of 3 did not connect within 0 s");
        assert_eq!(
            words::list(&(1..=17).collect::<Vec<_>>(), RANKS_SHOWN),
            "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 and 1 more"
        );
        let fault = call(&seat(1, 2, 1, "t"), &SHORT).map(drop).unwrap_err();
        assert!(fault.message.starts_with("rank 1 did not reach rank 0 at 127.0.0.1, port 1: "), "{fault}");
        assert_eq!(fault.kind, Kind::Device);
    }

    #[test]
    fn another_number_of_ranks_ends_both() {
        let (listener, port) = bound();
        std::thread::scope(|scope| {
            let first = scope.spawn(move || take_all(&seat(0, 3, port, "t"), &LIMITS, listener).map(drop));
            let other = scope.spawn(move || call(&seat(1, 4, port, "t"), &LIMITS).map(drop));
            for fault in [first, other].map(|ended| ended.join().unwrap().unwrap_err()) {
                assert!(fault.message.contains("was started among 4 ranks"), "{fault}");
                assert_eq!(fault.kind, Kind::Device);
            }
        });
    }

    #[test]
    fn the_end_of_a_rank_that_never_came_is_told() {
        let (listener, port) = bound();
        std::thread::scope(|scope| {
            let first = scope.spawn(move || take_all(&seat(0, 2, port, "t"), &LIMITS, listener).map(drop));
            tell_end(&seat(0, 2, port, "t").meeting, 1, &Fault::data("no rows"));
            let fault = first.join().unwrap().unwrap_err();
            assert_eq!((fault.kind, fault.message.as_str()), (Kind::Data, "rank 1 of 2: no rows"));
        });
        assert_eq!(of_rank("rank 1", Fault::network("x")).kind, Kind::Device);
        assert_eq!(of_rank("rank 1", interrupt::stopped()).kind, Kind::InterruptedUnsaved);
    }

    #[test]
    fn times_are_seconds() {
        assert_eq!(Limits::read(&|_| None).unwrap().silence, Duration::from_secs(30));
        let set = |name: &str| (name == "HONE_RANKS_SILENCE").then(|| "2".to_owned());
        assert_eq!(Limits::read(&set).unwrap().silence, Duration::from_secs(2));
        let fault = Limits::read(&|name| (name == "HONE_RANKS_WAIT").then(|| "0".to_owned())).unwrap_err();
        assert_eq!(fault.message, "HONE_RANKS_WAIT=0: expected a number of seconds from 1");
    }
}
