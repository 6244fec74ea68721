//! A machine with several devices -> one process for each, watched until all have ended.
//!
//! The first process of `hone run` starts this program again, once for each rank. It passes signals on, and ends with
//! the code of the rank that failed first. It trains nothing and opens no device. If it is killed, the kernel kills the
//! ranks, so that no orphan holds a GPU.

use std::ffi::OsString;
use std::net::TcpListener;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::device::{self, Choice, Gpus};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::ranks::Place;
use crate::ranks::frame::{self, kind_of};
use crate::ranks::meet;
use crate::ranks::place::{Environment, Found, Meeting, Node, Seat};

/// LIMIT: ranks that share a CPU with fewer processors. Each is a process with a model of its own.
const CPU_RANKS: usize = 16;
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Time that the other ranks have to end by themselves after one has failed; then they are killed.
const LEAVE_MAX: Duration = Duration::from_secs(20);
/// The same after a signal, when rank 0 writes a checkpoint.
const STOP_MAX: Duration = Duration::from_secs(120);

/// Choices of NCCL that may differ from run to run are fixed here, so that sums have the same order each time: a
/// ring of all GPUs, with one protocol. A variable that is set stays as it is.
pub const NCCL_ORDER: [(&str, &str); 3] =
    [("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple"), ("NCCL_NVLS_ENABLE", "0")];

/// Sets the variables of `NCCL_ORDER` that are not set, for this process and those that it starts. The program calls it
/// first.
pub fn fix_order_of_sums() {
    for (name, value) in NCCL_ORDER {
        if std::env::var_os(name).is_none() {
            // SAFETY: the process has no other thread yet, which might read the environment.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// The processes to start on this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Wish {
    /// The device.
    pub device: Choice,
    /// The GPUs, if the device leaves a choice.
    pub gpus: Option<Gpus>,
    /// Number of ranks on this machine.
    pub ranks: Option<usize>,
}

/// The ranks that this process starts.
#[derive(Clone, Debug, PartialEq)]
pub struct Crew {
    places: Vec<Place>,
    /// The address at which they meet; `None`: on this machine.
    meeting: Option<Meeting>,
    /// Whether they share the CPU.
    on_cpu: bool,
}

impl Crew {
    /// Returns the ranks that this process has to start; `None` if it trains by itself.
    ///
    /// # Errors
    /// Config: GPUs or ranks that are not available. Device: GPUs that the driver does not show.
    pub fn of(found: &Found, wish: &Wish) -> Result<Option<Crew>> {
        Crew::with(found, wish, &device::usable_gpus)
    }

    fn with(found: &Found, wish: &Wish, gpus: &dyn Fn() -> usize) -> Result<Option<Crew>> {
        let (node, meeting, asked) = match found {
            Found::Rank(_) => return Ok(None),
            Found::Alone => (None, None, wish.ranks),
            Found::Node(node) if node.nodes == 1 => (None, None, wish.ranks.or(node.ranks)),
            Found::Node(node) => (Some(node), Some(node.meeting.clone()), wish.ranks.or(node.ranks)),
        };
        let wish = Wish { ranks: asked, ..wish.clone() };
        let (local_world, on_cpu) = wish.ranks_here(gpus)?;
        let (first, world) = match node {
            Some(Node { node, nodes, .. }) => (node * local_world, nodes * local_world),
            None => (0, local_world),
        };
        let place = |local_rank| Place { rank: first + local_rank, world, local_rank, local_world };
        let places: Vec<Place> = (0..local_world).map(place).collect();
        Ok((world > 1).then_some(Crew { places, meeting, on_cpu }))
    }

    /// Returns a sentence about the ranks, for the log.
    pub fn shown(&self) -> String {
        let (here, world) = (self.places.len(), self.places[0].world);
        let what = if self.on_cpu { "this CPU" } else { "one GPU each" };
        match here == world {
            true => format!("{world} ranks train together, on {what}"),
            false => format!("{world} ranks train together, {here} of them on this machine, on {what}"),
        }
    }
}

impl Wish {
    /// Returns the number of ranks on this machine, and whether they compute on its CPU.
    fn ranks_here(&self, gpus: &dyn Fn() -> usize) -> Result<(usize, bool)> {
        match self.device {
            Choice::Cpu => return Ok((self.ranks_on_cpu()?, true)),
            Choice::Cuda(number) => {
                return match self.ranks {
                    None | Some(1) => Ok((1, false)),
                    Some(ranks) => {
                        Err(Fault::config(format!("ranks: {ranks} processes cannot share cuda:{number}"))
                            .help("remove device, and name the GPUs in gpus"))
                    }
                };
            }
            Choice::Auto => {}
        }
        let there = gpus();
        if there == 0 && self.gpus.is_none() {
            return Ok((self.ranks_on_cpu()?, true));
        }
        let chosen = self.gpus.clone().unwrap_or(Gpus::All).numbers(there)?.len();
        match self.ranks {
            Some(ranks) if ranks > chosen => Err(Fault::config(format!(
                "ranks: {ranks} processes were asked for, and there are {chosen} GPUs for them"
            ))
            .help("each rank has a GPU of its own: ask for fewer, or set device: cpu")),
            ranks => Ok((ranks.unwrap_or(chosen), false)),
        }
    }

    fn ranks_on_cpu(&self) -> Result<usize> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let most = processors.max(CPU_RANKS);
        match self.ranks.unwrap_or(1) {
            ranks if ranks > most => Err(Fault::config(format!(
                "ranks: {ranks} processes were asked for, and {processors} processors cannot carry more than {most}"
            ))
            .help("ask for at most one rank for each processor")),
            ranks => Ok(ranks),
        }
    }
}

/// The end of the ranks.
#[derive(Debug)]
pub struct Ended {
    /// The reason why the first of them failed; `None` if all succeeded.
    pub fault: Option<Fault>,
    /// Whether a rank reported the fault. If not, this process must.
    pub told: bool,
}

/// Starts the ranks with this command line, and waits until all have ended.
///
/// # Errors
/// Internal: a process cannot be started. Device: rank 0's port is taken.
pub fn run(crew: &Crew, arguments: &[OsString], environment: Environment) -> Result<Ended> {
    interrupt::listen()?;
    let (listener, meeting) = open(crew, environment)?;
    let mut team = Team { members: Vec::new(), meeting: meeting.clone() };
    let mut listener = listener;
    for place in &crew.places {
        let seat = Seat { place: *place, meeting: meeting.clone() };
        let socket = if place.leads() { listener.take() } else { None };
        let child = command(crew, &seat, arguments, socket, environment)
            .spawn()
            .map_err(|error| Fault::machine(&format!("start rank {}", place.rank), &error))?;
        team.members.push(Member { place: *place, child, status: None });
    }
    team.wait()
}

/// Returns the socket of rank 0, if it is on this machine, and where all meet.
fn open(crew: &Crew, environment: Environment) -> Result<(Option<TcpListener>, Meeting)> {
    let failed = |port: u16, error: std::io::Error| {
        Fault::new(Kind::Device, format!("rank 0 cannot listen on port {port}: {error}"))
            .help("name a free port in HONE_MASTER_PORT on every machine")
    };
    if let Some(meeting) = &crew.meeting {
        let port = meeting.ports[0];
        let leads = crew.places[0].leads();
        let socket =
            leads.then(|| meet::listen_soon(&meeting.host, port).map_err(|error| failed(port, error)));
        return Ok((socket.transpose()?, meeting.clone()));
    }
    let listener = meet::listen("127.0.0.1", 0).map_err(|error| failed(0, error))?;
    let port = listener.local_addr().map_err(|error| failed(0, error))?.port();
    let token = environment("HONE_RANKS_TOKEN").filter(|token| !token.is_empty());
    let token = token.map_or_else(frame::token, Ok);
    let token = token.map_err(|error| Fault::internal(format!("no random bytes: {error}")))?;
    Ok((Some(listener), Meeting { host: "127.0.0.1".into(), ports: vec![port], token }))
}

fn command(
    crew: &Crew,
    seat: &Seat,
    arguments: &[OsString],
    socket: Option<TcpListener>,
    environment: Environment,
) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let mut arguments = arguments.iter();
    command.arg0(arguments.next().map_or_else(|| "hone".into(), OsString::clone)).args(arguments);
    command.envs(seat.variables()).env(meet::PARENT, std::process::id().to_string());
    // A signal from a terminal goes to this process alone, which passes it on once.
    command.process_group(0);
    match socket {
        Some(socket) => command.env(meet::LISTENER, "stdin").stdin(Stdio::from(OwnedFd::from(socket))),
        None => command.env_remove(meet::LISTENER).stdin(Stdio::null()),
    };
    if crew.on_cpu && environment("RAYON_NUM_THREADS").is_none() {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let each = (threads / seat.place.local_world).max(1);
        command.env("RAYON_NUM_THREADS", each.to_string());
    }
    command
}

/// Returns whether another hone launched this process as a rank.
pub fn is_launched(environment: Environment) -> bool {
    environment(meet::PARENT).is_some()
}

/// Makes the kernel end this process with the one that started it as a rank.
///
/// # Errors
/// Interrupted: that process has ended already.
pub fn end_with_parent(environment: Environment) -> Result<()> {
    let Some(parent) = environment(meet::PARENT).and_then(|text| text.parse::<u32>().ok()) else {
        return Ok(());
    };
    // SAFETY: sets a number in the kernel's record of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    match std::os::unix::process::parent_id() == parent {
        true => Ok(()),
        false => Err(Fault::new(Kind::InterruptedUnsaved, "the process that started this rank has ended")),
    }
}

struct Member {
    place: Place,
    child: Child,
    status: Option<ExitStatus>,
}

struct Team {
    members: Vec<Member>,
    meeting: Meeting,
}

impl Team {
    fn wait(&mut self) -> Result<Ended> {
        let mut first: Option<(usize, Instant)> = None;
        let mut stopped = false;
        while self.members.iter().any(|member| member.status.is_none()) {
            if let (Some(failed), None) = (self.look()?, first) {
                first = Some((failed, Instant::now()));
            }
            if interrupt::requested() && !stopped {
                stopped = true;
                self.signal(libc::SIGTERM);
            }
            let longest = if stopped { STOP_MAX } else { LEAVE_MAX };
            if first.is_some_and(|(_, at)| at.elapsed() >= longest) {
                self.signal(libc::SIGKILL);
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(self.ended(first.map(|(index, _)| index)))
    }

    /// Checks for ranks that ended, and reports a failed one to rank 0. Returns the first that failed now.
    fn look(&mut self) -> Result<Option<usize>> {
        let mut found = None;
        for (index, member) in
            self.members.iter_mut().enumerate().filter(|(_, member)| member.status.is_none())
        {
            let failed =
                |error| Fault::internal(format!("cannot wait for rank {}: {error}", member.place.rank));
            member.status = member.child.try_wait().map_err(failed)?;
            if let Some(fault) = member.status.and_then(fault_of) {
                found.get_or_insert(index);
                if !member.place.leads() {
                    meet::tell_end(&self.meeting, member.place.rank, &fault);
                }
            }
        }
        Ok(found)
    }

    fn signal(&self, signal: i32) {
        for member in self.members.iter().filter(|member| member.status.is_none()) {
            // SAFETY: takes two numbers; the child has not been waited for, so the number is still its own.
            unsafe { libc::kill(member.child.id() as i32, signal) };
        }
    }

    /// Returns the result: that of rank 0 if it ended by itself, since it knows the reason, or else of the first that
    /// failed.
    fn ended(&self, first: Option<usize>) -> Ended {
        let Some(first) = first else { return Ended { fault: None, told: true } };
        let leader = self.members.iter().find(|member| member.place.leads());
        let leaders = leader.and_then(|leader| leader.status).filter(|status| status.code().is_some());
        if let Some(status) = leaders {
            return Ended { fault: fault_of(status), told: true };
        }
        let Member { place, status, .. } = &self.members[first];
        let fault = status.and_then(fault_of).expect("it failed");
        // A rank that ended by itself has reported the reason, or rank 0 on another machine has.
        let told = status.is_some_and(|status| status.code().is_some());
        let fault = meet::of_rank(&format!("rank {} of {}", place.rank, place.world), fault);
        Ended { fault: Some(fault), told }
    }
}

impl Drop for Team {
    /// Kills the ranks if this process cannot go on.
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        self.members.iter_mut().for_each(|member| drop(member.child.wait()));
    }
}

/// Returns the reason for which a process ended; `None` if it succeeded.
fn fault_of(status: ExitStatus) -> Option<Fault> {
    let fault = match (status.code(), status.signal()) {
        (Some(0), _) => return None,
        (Some(code), _) => {
            let kind = kind_of(code).unwrap_or(Kind::Device);
            Fault::new(kind, format!("the process ended with code {code} ({})", kind.name()))
        }
        (None, Some(libc::SIGKILL)) => Fault::new(
            Kind::Device,
            "the process was killed (signal 9), most likely because it ran out of memory",
        )
        .help("start it again: it continues from its newest checkpoint; give the machine more memory"),
        (None, signal) => {
            Fault::new(Kind::Device, format!("the process was killed by signal {}", signal.unwrap_or(0)))
                .help(
                    "the end of its log may say why; if it fails twice on the same node, look at nvidia-smi",
                )
        }
    };
    Some(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(device: Choice, gpus: Option<&str>, ranks: Option<usize>) -> Wish {
        Wish { device, gpus: gpus.map(|text| Gpus::parse(text).unwrap()), ranks }
    }

    fn node(node: usize, nodes: usize, ranks: Option<usize>) -> Found {
        let meeting = Meeting { host: "job-0.ranks".into(), ports: vec![29500], token: "t".into() };
        Found::Node(Node { node, nodes, ranks, meeting })
    }

    fn ranks(found: &Found, wish: &Wish, gpus: usize) -> Option<Vec<(usize, usize)>> {
        let crew = Crew::with(found, wish, &|| gpus).unwrap()?;
        Some(crew.places.iter().map(|place| (place.rank, place.world)).collect())
    }

    #[test]
    fn a_rank_for_each_gpu() {
        let auto = |gpus| wish(Choice::Auto, gpus, None);
        assert_eq!(ranks(&Found::Alone, &auto(None), 0), None);
        assert_eq!(ranks(&Found::Alone, &auto(None), 1), None);
        assert_eq!(ranks(&Found::Alone, &auto(None), 2), Some(vec![(0, 2), (1, 2)]));
        assert_eq!(ranks(&Found::Alone, &auto(Some("0,2,3")), 4).unwrap().len(), 3);
        assert_eq!(ranks(&Found::Alone, &auto(Some("1")), 4), None);
        assert_eq!(ranks(&Found::Alone, &wish(Choice::Cuda(1), None, None), 4), None);
        assert_eq!(ranks(&Found::Alone, &wish(Choice::Cpu, None, Some(3)), 4).unwrap().len(), 3);
        assert_eq!(ranks(&Found::Alone, &wish(Choice::Auto, None, Some(2)), 8).unwrap().len(), 2);
        assert_eq!(ranks(&node(1, 2, None), &auto(None), 2), Some(vec![(2, 4), (3, 4)]));
        assert_eq!(ranks(&node(1, 3, None), &auto(None), 0), Some(vec![(1, 3)]));
        assert_eq!(ranks(&node(0, 1, Some(2)), &auto(None), 0), Some(vec![(0, 2), (1, 2)]));
        let rank = Seat {
            place: Place { rank: 1, world: 2, local_rank: 1, local_world: 2 },
            meeting: Meeting { host: "a".into(), ports: vec![1], token: String::new() },
        };
        assert_eq!(ranks(&Found::Rank(rank), &auto(None), 8), None);
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        assert_eq!(ranks(&Found::Alone, &wish(Choice::Cpu, None, Some(16)), 0).unwrap().len(), 16);
        for (wish, gpus, part) in [
            (wish(Choice::Auto, None, Some(3)), 2, "3 processes were asked for, and there are 2 GPUs"),
            (wish(Choice::Cuda(1), None, Some(2)), 2, "cannot share cuda:1"),
            (wish(Choice::Auto, Some("0,4"), None), 2, "gpus: GPU 4"),
            (wish(Choice::Auto, Some("4"), None), 2, "gpus: 4 GPUs"),
            (wish(Choice::Auto, Some("all"), None), 0, "gpus: "),
            (wish(Choice::Cpu, None, Some(1_000_000)), 0, "ranks: 1000000 processes were asked for, and "),
            (wish(Choice::Auto, None, Some(usize::MAX)), 0, "processors cannot carry more than "),
        ] {
            let fault = Crew::with(&Found::Alone, &wish, &|| gpus).unwrap_err();
            assert!(fault.message.contains(part), "{fault}");
        }
    }

    fn status(command: &str) -> Option<Fault> {
        fault_of(Command::new("sh").args(["-c", command]).status().unwrap())
    }

    #[test]
    fn the_end_of_a_process_says_who_must_act() {
        assert!(status("exit 0").is_none());
        assert_eq!(status("exit 11").unwrap().kind, Kind::Data);
        assert_eq!(status("exit 1").unwrap().kind, Kind::Device);
        let killed = status("kill -9 $$").unwrap();
        assert_eq!(killed.kind, Kind::Device);
        assert!(killed.message.contains("signal 9"), "{killed}");
    }
}
