//! The environment -> the place of this process among those that train together, for every launcher.
//!
//! The first set of variables that is there decides: hone's own, those of torchrun (also `accelerate launch` and
//! PyTorchJob), those of a TrainJob (`PET_*`), and those of an Indexed Job. A set that is there in part is refused,
//! since a process that trained by itself by mistake would write another adapter.

use crate::fault::{Fault, Result};
use crate::ranks::Place;

/// The variables of a process.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Port of rank 0, unless the environment names another one.
pub const PORT: u16 = 29500;
/// torchrun keeps a store of its own on the port that it names. The ranks meet on the first free port behind it.
const PORTS_BEHIND: u16 = 16;

/// LIMIT: ranks, machines, and ranks on a machine. No launcher starts so many, and no product of two such numbers
/// overflows.
const NUMBER_MAX: usize = 1 << 16;

/// The place of this process by its environment.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// The process trains by itself, unless it starts ranks on its own machine.
    Alone,
    /// The process is one rank; somebody else started the others.
    Rank(Seat),
    /// The process is the only one on its machine. There are several machines, and it starts the ranks of this one.
    Node(Node),
}

/// A rank, and the address at which it meets the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Seat {
    /// The rank's place.
    pub place: Place,
    /// The address at which the ranks meet.
    pub meeting: Meeting,
}

/// The address at which the ranks of a run meet, and the secret that proves that they belong together.
#[derive(Clone, Debug, PartialEq)]
pub struct Meeting {
    /// Name or address of the machine of rank 0.
    pub host: String,
    /// The ports that rank 0 may listen on; the first free one is taken.
    pub ports: Vec<u16>,
    /// A text that all ranks know. It is never sent.
    pub token: String,
}

/// One machine of several.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Number of this machine, from 0.
    pub node: usize,
    /// Number of machines.
    pub nodes: usize,
    /// Ranks on each machine, if the environment says so.
    pub ranks: Option<usize>,
    /// The address at which the ranks meet.
    pub meeting: Meeting,
}

/// Names of a set of variables that gives a rank.
struct Names {
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
    local_world: &'static str,
    host: &'static str,
    port: &'static str,
}

const OWN: Names = Names {
    rank: "HONE_RANK",
    world: "HONE_WORLD_SIZE",
    local_rank: "HONE_LOCAL_RANK",
    local_world: "HONE_LOCAL_WORLD_SIZE",
    host: "HONE_MASTER_ADDR",
    port: "HONE_MASTER_PORT",
};

const TORCH: Names = Names {
    rank: "RANK",
    world: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    local_world: "LOCAL_WORLD_SIZE",
    host: "MASTER_ADDR",
    port: "MASTER_PORT",
};

/// Reads the place of this process.
///
/// # Errors
/// Config: a set of variables is there in part, or a variable has no possible value. The message names what is missing.
pub fn find(environment: Environment) -> Result<Found> {
    let set = |name: &str| value(environment, name).is_some();
    let rank = |names: &Names| set(names.rank) || set(names.world);
    let found = match () {
        () if rank(&OWN) => seat(&OWN, environment)?,
        // PyTorchJob numbers its pods in RANK. If they have several processes each, PET_* has more information.
        () if rank(&TORCH) && (set(TORCH.local_rank) || !set("PET_NNODES")) => seat(&TORCH, environment)?,
        () if set("PET_NNODES") || set("PET_NODE_RANK") => of_train_job(environment)?,
        () if set("HONE_NODES") => of_indexed_job(environment)?,
        () => Found::Alone,
    };
    Ok(match found {
        Found::Rank(seat) if seat.place.world == 1 => Found::Alone,
        Found::Node(node) if node.nodes == 1 && node.ranks == Some(1) => Found::Alone,
        found => found,
    })
}

fn seat(names: &Names, environment: Environment) -> Result<Found> {
    let reader = Reader { environment, reason: names.rank };
    let (rank, world) = (reader.number(names.rank)?, reader.number(names.world)?);
    if world == 1 && rank == 0 {
        return Ok(Found::Alone);
    }
    let local = [names.local_rank, names.local_world];
    // A pod with one process need not say that it is the only one on its machine.
    let (local_rank, local_world) = match local.iter().all(|name| value(environment, name).is_none()) {
        true => (0, 1),
        false => (reader.number(local[0])?, reader.number(local[1])?),
    };
    let place = Place { rank, world, local_rank, local_world };
    if rank >= world || local_rank >= local_world || local_world > world {
        return Err(Fault::config(format!(
            "{}={rank}, {}={world}, {}={local_rank}, {}={local_world} are no place: a rank is below the number of ranks",
            names.rank, names.world, names.local_rank, names.local_world
        )));
    }
    let host = reader.text(names.host)?;
    Ok(Found::Rank(Seat { place, meeting: reader.meeting(host, names.port, world)? }))
}

/// Reads the place from a TrainJob of Kubeflow Trainer, which sets the variables that torchrun would read. hone
/// replaces torchrun.
fn of_train_job(environment: Environment) -> Result<Found> {
    let nodes = Reader { environment, reason: "PET_NODE_RANK" }.number("PET_NNODES")?;
    let reader = Reader { environment, reason: "PET_NNODES" };
    if nodes == 1 {
        return Ok(match ranks_on_node(environment)? {
            None => Found::Alone,
            ranks => Found::Node(Node { node: 0, nodes: 1, ranks, meeting: loopback(environment) }),
        });
    }
    let node = reader.number("PET_NODE_RANK")?;
    node_below("PET_NODE_RANK", node, nodes)?;
    let host = reader.text("PET_MASTER_ADDR")?;
    let meeting = reader.meeting(host, "PET_MASTER_PORT", nodes)?;
    Ok(Found::Node(Node { node, nodes, ranks: ranks_on_node(environment)?, meeting }))
}

/// Returns the address at which the ranks of one machine meet.
fn loopback(environment: Environment) -> Meeting {
    let token = value(environment, "HONE_RANKS_TOKEN").unwrap_or_default();
    Meeting { host: "127.0.0.1".into(), ports: vec![0], token }
}

fn ranks_on_node(environment: Environment) -> Result<Option<usize>> {
    match value(environment, "PET_NPROC_PER_NODE").as_deref() {
        // One for each GPU, and one on a machine without any.
        None | Some("auto" | "gpu" | "cpu") => Ok(None),
        Some(_) => Reader { environment, reason: "PET_NNODES" }.number("PET_NPROC_PER_NODE").map(Some),
    }
}

fn of_indexed_job(environment: Environment) -> Result<Found> {
    let reader = Reader { environment, reason: "HONE_NODES" };
    let nodes = reader.number("HONE_NODES")?;
    if nodes == 1 {
        return Ok(Found::Alone);
    }
    let node = reader.number("JOB_COMPLETION_INDEX")?;
    node_below("JOB_COMPLETION_INDEX", node, nodes)?;
    let meeting = reader.meeting(reader.text("HONE_MASTER_ADDR")?, "HONE_MASTER_PORT", nodes)?;
    Ok(Found::Node(Node { node, nodes, ranks: None, meeting }))
}

fn node_below(name: &str, node: usize, nodes: usize) -> Result<()> {
    match node < nodes {
        true => Ok(()),
        false => Err(Fault::config(format!(
            "{name}={node}: expected a number below {nodes}, the number of machines"
        ))),
    }
}

/// Returns a variable that is set; an empty one is not.
fn value(environment: Environment, name: &str) -> Option<String> {
    environment(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

struct Reader<'a> {
    environment: Environment<'a>,
    /// The variable that makes the others necessary.
    reason: &'static str,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Result<String> {
        value(self.environment, name).ok_or_else(|| {
            Fault::config(format!("{name} is missing beside {}", self.reason)).help(format!(
                "start the ranks with hone run, torchrun or a Job that sets all of them, or unset {}",
                self.reason
            ))
        })
    }

    fn number(&self, name: &str) -> Result<usize> {
        let text = self.text(name)?;
        let number = text.parse().ok().filter(|number| *number <= NUMBER_MAX);
        number.ok_or_else(|| {
            Fault::config(format!("{name}={text}: expected a whole number from 0 to {NUMBER_MAX}"))
        })
    }

    fn port(&self, name: &str) -> Result<u16> {
        let Some(text) = value(self.environment, name) else { return Ok(PORT) };
        let port = text.parse().ok().filter(|port| *port > 0);
        port.ok_or_else(|| Fault::config(format!("{name}={text}: expected a port, from 1 to 65535")))
    }

    fn meeting(&self, host: String, port_name: &str, processes: usize) -> Result<Meeting> {
        let get = |name: &str| value(self.environment, name);
        let port = self.port(port_name)?;
        let own = get(OWN.port).is_some();
        let store = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text.eq_ignore_ascii_case("true"));
        let ports = match () {
            () if own => vec![self.port(OWN.port)?],
            () if store => behind(port),
            () => vec![port],
        };
        // Without a token of their own, runs are distinguished by values that their launcher gives each of them.
        let token = get("HONE_RANKS_TOKEN").unwrap_or_else(|| {
            let parts = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
                .map(|name| get(name).unwrap_or_default());
            format!("{} {} {host} {port} {processes}", parts[0], parts[1])
        });
        Ok(Meeting { host, ports, token })
    }
}

fn behind(port: u16) -> Vec<u16> {
    match port.checked_add(PORTS_BEHIND) {
        Some(last) => (port + 1..=last).collect(),
        None => (port - PORTS_BEHIND..port).collect(),
    }
}

impl Seat {
    /// Returns the variables by which a rank finds this seat.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let Place { rank, world, local_rank, local_world } = self.place;
        let numbers = [
            (OWN.rank, rank),
            (OWN.world, world),
            (OWN.local_rank, local_rank),
            (OWN.local_world, local_world),
            (OWN.port, self.meeting.ports[0].into()),
        ];
        let texts = [(OWN.host, &self.meeting.host), ("HONE_RANKS_TOKEN", &self.meeting.token)];
        let numbers = numbers.into_iter().map(|(name, number)| (name, number.to_string()));
        numbers.chain(texts.into_iter().map(|(name, text)| (name, text.clone()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(variables: &str) -> Result<Found> {
        let pairs: Vec<(&str, &str)> =
            variables.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
        find(&|name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned()))
    }

    fn rank(variables: &str) -> (Place, Vec<u16>, String) {
        match found(variables).unwrap() {
            Found::Rank(seat) => (seat.place, seat.meeting.ports, seat.meeting.host),
            other => panic!("{variables}: {other:?}"),
        }
    }

    fn node(variables: &str) -> (usize, usize, Option<usize>, Vec<u16>) {
        match found(variables).unwrap() {
            Found::Node(node) => (node.node, node.nodes, node.ranks, node.meeting.ports),
            other => panic!("{variables}: {other:?}"),
        }
    }

    const TORCHRUN: &str =
        "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=4000";

    #[test]
    fn every_launcher_gives_a_place() {
        let place = |rank, world, local_rank, local_world| Place { rank, world, local_rank, local_world };
        assert_eq!(rank(TORCHRUN), (place(3, 4, 1, 2), vec![4000], "a".into()));
        let (_, ports, _) = rank(&format!("{TORCHRUN} TORCHELASTIC_USE_AGENT_STORE=True"));
        assert_eq!((ports.len(), ports[0]), (16, 4001), "the agent's store has the port itself");
        let (_, ports, _) = rank(&format!("{TORCHRUN} TORCHELASTIC_USE_AGENT_STORE=True HONE_MASTER_PORT=5"));
        assert_eq!(ports, [5]);
        // hone's own come first; PyTorchJob has one process in a pod.
        let own = "HONE_RANK=0 HONE_WORLD_SIZE=2 HONE_MASTER_ADDR=b";
        assert_eq!(rank(&format!("{TORCHRUN} {own}")), (place(0, 2, 0, 1), vec![PORT], "b".into()));
        assert_eq!(rank("RANK=1 WORLD_SIZE=2 MASTER_ADDR=c MASTER_PORT=23456").0, place(1, 2, 0, 1));
        // One process a pod in RANK, and more in PET_*: hone starts the pod's own.
        let pet = "PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=4 PET_MASTER_ADDR=d PET_MASTER_PORT=29400";
        assert_eq!(node(pet), (1, 2, Some(4), vec![29400]));
        assert_eq!(node(&format!("RANK=1 WORLD_SIZE=8 MASTER_ADDR=d {pet}")).2, Some(4));
        assert_eq!(node("PET_NNODES=1 PET_NPROC_PER_NODE=2").2, Some(2));
        assert_eq!(node("PET_NNODES=2 PET_NODE_RANK=0 PET_NPROC_PER_NODE=gpu PET_MASTER_ADDR=d").2, None);
        let indexed = "HONE_NODES=3 JOB_COMPLETION_INDEX=2 HONE_MASTER_ADDR=job-0.ranks";
        assert_eq!(node(indexed), (2, 3, None, vec![PORT]));
    }

    #[test]
    fn one_process_is_alone() {
        for variables in [
            "",
            "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1",
            "MASTER_ADDR=a MASTER_PORT=1 LOCAL_RANK=0",
            "JOB_COMPLETION_INDEX=4",
            "HONE_NODES=1 JOB_COMPLETION_INDEX=0",
            "PET_NNODES=1 PET_NPROC_PER_NODE=1",
            "PET_NNODES=1 PET_NPROC_PER_NODE=auto PET_NODE_RANK=0",
            "RANK= WORLD_SIZE=",
        ] {
            assert_eq!(found(variables).unwrap(), Found::Alone, "{variables}");
        }
    }

    #[test]
    fn half_an_environment_is_refused_by_what_is_missing() {
        for (variables, part) in [
            ("RANK=0", "WORLD_SIZE is missing beside RANK"),
            ("WORLD_SIZE=2", "RANK is missing"),
            ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR is missing"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a", "LOCAL_WORLD_SIZE is missing"),
            ("HONE_RANK=0 HONE_WORLD_SIZE=2", "HONE_MASTER_ADDR is missing"),
            ("HONE_NODES=2", "JOB_COMPLETION_INDEX is missing beside HONE_NODES"),
            ("HONE_NODES=2 JOB_COMPLETION_INDEX=0", "HONE_MASTER_ADDR is missing"),
            ("PET_NNODES=2 PET_MASTER_ADDR=a", "PET_NODE_RANK is missing"),
            ("PET_NODE_RANK=0", "PET_NNODES is missing"),
            ("PET_NNODES=1:4 PET_NODE_RANK=0", "PET_NNODES=1:4: expected a whole number"),
            ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a", "are no place"),
            ("RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a", "RANK=-1: expected a whole number"),
            ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0", "expected a port"),
            ("HONE_NODES=2 JOB_COMPLETION_INDEX=2 HONE_MASTER_ADDR=a", "below 2"),
        ] {
            let fault = found(variables).unwrap_err();
            assert!(fault.message.contains(part), "{variables}: {fault}");
            assert_eq!(fault.kind.exit_code(), 10);
        }
    }

    #[test]
    fn a_started_rank_finds_the_seat_that_it_was_given() {
        let place = Place { rank: 1, world: 4, local_rank: 1, local_world: 2 };
        let meeting = Meeting { host: "h".into(), ports: vec![7], token: "t".into() };
        let seat = Seat { place, meeting };
        let variables = seat.variables();
        let get = |name: &str| variables.iter().find(|pair| pair.0 == name).map(|pair| pair.1.clone());
        assert_eq!(find(&get).unwrap(), Found::Rank(seat));
    }
}
