//! `hone controller`: Workspaces that tune -> Jobs, those that serve -> servers, and the state of both -> the
//! Workspaces' status.
//!
//! The controller is level-triggered: every reconciliation starts from the cluster's state (`reconcile`), so that
//! nothing is lost with the process. `watches` keeps this state in memory, so that a Workspace at rest costs no
//! request. `observe` and `status` are pure; `revision`, `nodes` and `lease` each keep one kind of object; `ask`
//! queries servers; `events` writes and reads Events; `presence` notices KAITO and Karpenter; `webhook` answers the API
//! server's reviews with the `certificates` that the controller makes itself; `install` has the objects that a cluster
//! needs to run it.

mod apply;
mod ask;
mod certificates;
mod ended;
mod events;
pub mod install;
mod lease;
mod metrics;
mod nodes;
mod observe;
mod pods;
mod presence;
mod progress;
mod reconcile;
mod reconciler;
mod revision;
mod serve;
mod servers;
mod status;
mod told;
mod tuning;
mod watches;
pub mod webhook;
mod words;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, Stream, StreamExt};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, PodTemplateSpec, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DynamicObject, ListParams, PartialObjectMeta};
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{applier, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::watch;

use crate::backoff;
use crate::endpoint::{self, Reply};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage};
use crate::source;
use crate::workspace::serve::adapters_name;
use crate::workspace::{MANAGED_BY, MANAGER, Settings, WORKSPACE_LABEL, Workspace, config_name};
use events::Recorder;
use lease::Election;
use metrics::Metrics;
use presence::{Presence, in_time};
use progress::Progress;
use revision::Known;
use watches::{Cache, Healths, Owner, Triggers, keep, same_version};
use webhook::Webhook;

/// The field manager of everything that this controller writes.
const FIELD_MANAGER: &str = "hone-controller";
const LEASE: &str = "hone-controller";
/// Workspaces that are reconciled at the same time.
const CONCURRENCY: u16 = 8;
/// The first pause after an error, which doubles up to the longest.
const RETRY: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(240);
/// LIMIT: time of one reconciliation with all its requests.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// LIMIT: time that the first reconciliations wait for lists that they can do without.
const LISTS_MAX: Duration = Duration::from_secs(5);
/// The interval at which a process that does not lead checks whether it could.
const STANDBY_INTERVAL: Duration = Duration::from_secs(30);

/// The options of `hone controller`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Only Workspaces of this namespace are reconciled; `None`: all.
    pub namespace: Option<String>,
    /// Image, GPUs and cloud of the pods.
    pub settings: Settings,
    /// Whether several processes run, of which one is elected to lead.
    pub elect: bool,
    /// The namespace of the Lease.
    pub lease_namespace: String,
    /// The name of this process in the Lease and in Events.
    pub identity: String,
    /// The address of `/healthz`, `/readyz` and `/metrics`.
    pub address: SocketAddr,
    /// Options of the webhook that reviews Workspaces when they are written; `None`: there is no webhook.
    pub webhook: Option<webhook::Options>,
}

/// The state that all reconciliations share. Objects are copies of the cluster's, as the watches last received them;
/// notes only save requests.
struct Context {
    client: Client,
    /// The client for the servers of Workspaces.
    http: reqwest::Client,
    settings: Settings,
    /// The only namespace that this controller looks after; `None`: all.
    namespace: Option<String>,
    events: Recorder,
    metrics: Arc<Metrics>,
    presence: watch::Sender<Presence>,
    healths: Healths,
    triggers: Triggers,
    workspaces: Store<Workspace>,
    jobs: Cache<Job>,
    pods: Cache<Pod>,
    sets: Cache<StatefulSet>,
    services: Cache<Service>,
    budgets: Cache<PodDisruptionBudget>,
    /// All nodes are in one group.
    nodes: Cache<Node>,
    /// ConfigMaps by their own namespace and name.
    configs: Cache<PartialObjectMeta<ConfigMap>>,
    claims: Cache<DynamicObject>,
    texts: Mutex<HashMap<Owner, Arc<ConfigMap>>>,
    notes: Mutex<HashMap<Owner, Notes>>,
    /// Workspaces that no node has been found for.
    without_node: Mutex<HashSet<Owner>>,
}

/// Notes about a Workspace between two reconciliations. They save requests and decide nothing.
#[derive(Clone, Debug, Default)]
struct Notes {
    uid: Option<String>,
    /// Reconciliations in a row that failed or were refused.
    failures: u32,
    /// The Workspace as this controller last wrote it, until the watch reports that version.
    own: Option<Arc<Workspace>>,
    /// The newest revision; `None` until it was read.
    known: Option<Option<Known>>,
    progress: Option<Progress>,
    warning: Option<String>,
    /// Versions of a server's objects, as this controller last wrote them, by kind and name.
    applied: BTreeMap<String, String>,
    /// The servers' last answers about their adapters.
    answers: ask::Answers,
    answers_due: Due,
    /// The digest of the file that the servers were asked about.
    asked_of: String,
    progress_due: Due,
    warning_due: Due,
    /// Whether a task already waits for somebody else's object of this name to go.
    foreign: Arc<AtomicBool>,
}

/// The time of the next request for something; pauses grow.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    at: Option<Instant>,
    pause: Duration,
}

impl Due {
    /// Returns whether the request is due: the first time after `first`, then after pauses that double up to `most`.
    fn is_now(&mut self, first: Duration, most: Duration) -> bool {
        let now = Instant::now();
        match self.at {
            None => {
                *self = Due { at: Some(now + first), pause: first };
                false
            }
            Some(at) if now < at => false,
            Some(_) => {
                self.pause = (self.pause * 2).min(most);
                self.at = Some(now + self.pause);
                true
            }
        }
    }

    fn left(&self) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn owner_of(workspace: &Workspace) -> Owner {
    (workspace.namespace().to_owned(), workspace.name().to_owned())
}

/// Returns the owner of nodes, which belong to no Workspace.
fn no_owner() -> Owner {
    (String::new(), String::new())
}

impl Context {
    fn presence(&self) -> Presence {
        *self.presence.borrow()
    }

    /// Reads or changes the notes about a Workspace. A new Workspace of the same name starts with empty notes.
    fn note<T>(&self, workspace: &Workspace, with: impl FnOnce(&mut Notes) -> T) -> T {
        let mut list = locked(&self.notes);
        let notes = list.entry(owner_of(workspace)).or_default();
        if notes.uid != workspace.metadata.uid {
            *notes = Notes { uid: workspace.metadata.uid.clone(), ..Notes::default() };
        }
        with(notes)
    }

    fn forget(&self, workspace: &Workspace) {
        let owner = owner_of(workspace);
        locked(&self.notes).remove(&owner);
        locked(&self.without_node).remove(&owner);
        self.metrics.forget(workspace);
    }

    /// Returns the pause before the next try; it doubles with each failure in a row.
    fn pause(&self, workspace: &Workspace) -> Duration {
        self.note(workspace, |notes| {
            notes.failures += 1;
            // The remembered revision may be the cause.
            notes.known = None;
            backoff::pause(RETRY, RETRY_MAX, notes.failures)
        })
    }

    fn look_at_all(&self) {
        for workspace in self.workspaces.state() {
            self.triggers.look_at(&owner_of(&workspace));
        }
    }
}

/// Runs the controller until a signal comes or another process leads.
///
/// # Errors
/// Config: no cluster to talk to, or no right to. Network: it does not answer. Interrupted: the lead was lost; the
/// cluster starts this process again.
pub fn run(options: &Options, report: &Report) -> Result<()> {
    source::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Fault::machine("start the network runtime", &error))?;
    let ended = runtime.block_on(async {
        let config = kube::Config::infer().await.map_err(|error| {
            Fault::config(format!("no cluster: {error}")).help("set KUBECONFIG, or run it inside of one")
        })?;
        let server = config.cluster_url.to_string();
        let ended = match Client::try_from(config) {
            Ok(client) => run_with(client, options, report, signal()).await,
            Err(error) => Err(unreachable(error)),
        };
        ended.map_err(|fault| if fault.kind == Kind::Network { fault.at(server) } else { fault })
    });
    runtime.shutdown_background();
    ended
}

async fn signal() {
    while !interrupt::requested() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs the controller with the given client until `stop`.
///
/// # Errors
/// As `run`.
pub async fn run_with(
    client: Client,
    options: &Options,
    report: &Report,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let metrics = Arc::new(Metrics::default());
    let healths = Healths::default();
    let standby = Arc::new(Mutex::new(Some("the API server has not answered yet".to_owned())));
    let webhook = options.webhook.as_ref();
    let webhook =
        webhook.map(|how| Webhook::new(client.clone(), how, &options.lease_namespace, &options.settings));
    let webhook = webhook.transpose()?;
    let mut troubles = vec![standby.clone()];
    troubles.extend(webhook.as_ref().map(|webhook| webhook.trouble.clone()));
    let _endpoint = endpoint::start(options.address, answers(metrics.clone(), healths.clone(), troubles))?;
    let mut election =
        Election::new(Api::namespaced(client.clone(), &options.lease_namespace), LEASE, &options.identity);
    let lead = async {
        let version = in_time(LOOK_MAX, client.apiserver_version()).await.map_err(unreachable)?;
        report.note(Stage::Plan, format!("Kubernetes {} answers", version.git_version));
        if options.elect {
            tokio::select! {
                () = election.won() => {}
                () = stand_by(&client, options, &standby) => {}
            }
            report.note(Stage::Plan, format!("{} leads", options.identity));
        }
        *locked(&standby) = None;
        metrics.leads(true);
        tokio::select! {
            ended = control(client.clone(), options, report, metrics.clone(), healths.clone()) => ended,
            why = async { if options.elect { election.lost().await } else { std::future::pending().await } } => {
                Err(Fault::new(Kind::Interrupted, why))
            }
        }
    };
    let reviews = async {
        if let Some(webhook) = webhook {
            webhook.run().await;
        }
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        ended = lead => ended,
        () = reviews => Ok(()),
        () = stop => Ok(()),
    };
    metrics.leads(false);
    if options.elect {
        election.release().await;
    }
    ended
}

/// Keeps the readiness of a process that does not lead. It is ready if it could lead, which means that it can list
/// Workspaces.
async fn stand_by(client: &Client, options: &Options, trouble: &Mutex<Option<String>>) {
    loop {
        let one = ListParams::default().limit(1);
        let listed =
            in_time(LOOK_MAX, async { api::<Workspace>(client, options).list_metadata(&one).await }).await;
        *locked(trouble) = listed.err().map(|error| format!("workspaces cannot be listed: {error}"));
        tokio::time::sleep(STANDBY_INTERVAL).await;
    }
}

/// Watches the cluster and reconciles each Workspace when it or one of its objects changes.
async fn control(
    client: Client,
    options: &Options,
    report: &Report,
    metrics: Arc<Metrics>,
    healths: Healths,
) -> Result<()> {
    let found = presence::look(&client).await.map_err(unreachable)?;
    if found.kaito {
        report.warn(Stage::Plan, KAITO_IS_HERE);
    }
    let (triggers, queue) = Triggers::new();
    let (workspaces, writer) = reflector::store();
    let context = Arc::new(Context {
        events: Recorder::new(client.clone(), &options.identity),
        http: ask::client(),
        settings: options.settings.clone(),
        namespace: options.namespace.clone(),
        presence: watch::Sender::new(found),
        metrics,
        healths,
        triggers,
        workspaces,
        jobs: Cache::default(),
        pods: Cache::default(),
        sets: Cache::default(),
        services: Cache::default(),
        budgets: Cache::default(),
        nodes: Cache::default(),
        configs: Cache::default(),
        claims: Cache::default(),
        texts: Mutex::default(),
        notes: Mutex::default(),
        without_node: Mutex::default(),
        client,
    });
    let again = watch::Sender::new(0);
    tokio::select! {
        () = watch_all(&context, options, writer, &again) => {}
        () = presence::keep(&context.client, &context.presence, &again) => {}
        () = follow_presence(&context, &again, report) => {}
        () = look_when_asked(&context, queue, report) => {}
    }
    Err(Fault::internal("the controller ended"))
}

/// Runs the requested reconciliations as soon as the lists that they need are complete.
async fn look_when_asked(
    context: &Arc<Context>,
    queue: impl Stream<Item = ObjectRef<Workspace>>,
    report: &Report,
) {
    // Jobs and Workspaces decide. Other lists that have not come after a while are read one object at a time, or
    // reported later.
    let begun = Instant::now();
    let lists = ["pods", "configmaps", "nodes", "jobs", "statefulsets", "services", "poddisruptionbudgets"];
    while begun.elapsed() < LISTS_MAX && !lists.iter().all(|name| context.healths.is_fine(name)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let queue = queue.map(Ok::<_, std::convert::Infallible>);
    let config = Config::default().concurrency(CONCURRENCY);
    let work = applier(
        |workspace, context| look(workspace, context).boxed(),
        after_error,
        context.clone(),
        context.workspaces.clone(),
        queue,
        config,
    );
    let mut work = std::pin::pin!(work);
    while let Some(done) = work.next().await {
        match done {
            Ok(_) => {}
            // A Workspace that went between the queue and the reconciliation is no error.
            Err(kube::runtime::controller::Error::ObjectNotFound(gone)) => {
                let owner = (gone.namespace.unwrap_or_default(), gone.name);
                if let Err(error) = in_time(LOOK_MAX, reconcile::give_back_of(&owner, context)).await {
                    report.warn(Stage::Plan, format!("node claims of a Workspace that is gone: {error}"));
                }
            }
            Err(error) => report.warn(Stage::Plan, format!("{error}; it is tried again")),
        }
    }
}

async fn look(workspace: Arc<Workspace>, context: Arc<Context>) -> kube::Result<Action> {
    let action = in_time(LOOK_MAX, reconcile::reconcile(workspace.clone(), context.clone())).await?;
    Ok(action)
}

fn after_error(workspace: Arc<Workspace>, _: &kube::Error, context: Arc<Context>) -> Action {
    Action::requeue(context.pause(&workspace))
}

/// Runs all watches except the one of node claims, without end.
async fn watch_all(
    context: &Arc<Context>,
    options: &Options,
    mut writer: reflector::store::Writer<Workspace>,
    again: &watch::Sender<u64>,
) {
    let client = &context.client;
    let all = watcher::Config::default;
    let ours = || all().labels(&format!("{MANAGED_BY}={MANAGER}"));
    let trigger = |owners: Vec<Owner>| owners.iter().for_each(|owner| context.triggers.look_at(owner));
    let workspaces = |event: watcher::Event<Workspace>| {
        let event = event.modify(|workspace| workspace.metadata.managed_fields = None);
        writer.apply_watcher_event(&event);
        match event {
            watcher::Event::Apply(workspace) => {
                context.triggers.look_at(&owner_of(&workspace));
                if workspace.tuning.is_some() {
                    look_at_followers(&workspace, context);
                }
            }
            watcher::Event::Delete(workspace) => {
                context.forget(&workspace);
                look_at_followers(&workspace, context);
                // Its node claims are deleted even if somebody removed the finalizer.
                context.triggers.look_at(&owner_of(&workspace));
            }
            watcher::Event::InitDone => context.look_at_all(),
            _ => {}
        }
    };
    let jobs = |event: watcher::Event<Job>| {
        let event = event.modify(strip_job);
        trigger(context.jobs.take(event, labelled, same_version));
    };
    let pods = |event: watcher::Event<Pod>| {
        let event = event.modify(strip_pod);
        trigger(context.pods.take(event, labelled, same_version));
    };
    let sets = |event: watcher::Event<StatefulSet>| {
        let event = event.modify(strip_set);
        trigger(context.sets.take(event, labelled, same_version));
    };
    let services = |event: watcher::Event<Service>| {
        let event = event.modify(|service| service.metadata.managed_fields = None);
        trigger(context.services.take(event, labelled, apply::same_mark));
    };
    let budgets = |event: watcher::Event<PodDisruptionBudget>| {
        let event = event.modify(|budget| budget.metadata.managed_fields = None);
        trigger(context.budgets.take(event, labelled, apply::same_mark));
    };
    let configs = |event: watcher::Event<PartialObjectMeta<ConfigMap>>| {
        let listed = matches!(event, watcher::Event::InitDone);
        let event = event.modify(|map| {
            map.metadata.managed_fields = None;
            map.metadata.annotations = None;
            map.metadata.labels = None;
        });
        let changed = context.configs.take(event, own_name, same_version);
        match listed {
            true => context.look_at_all(),
            false => changed.iter().for_each(|map| of_config(map, context)),
        }
    };
    let nodes = |event: watcher::Event<Node>| {
        let event = event.modify(nodes::strip);
        if !context.nodes.take(event, |_| Some(no_owner()), nodes::same).is_empty() {
            trigger(locked(&context.without_node).iter().cloned().collect());
        }
    };
    let healths = || context.healths.clone();
    tokio::join!(
        keep("workspaces", api(client, options), all(), workspaces, healths(), again.subscribe()),
        keep("jobs", api(client, options), ours(), jobs, healths(), again.subscribe()),
        keep("pods", api(client, options), ours(), pods, healths(), again.subscribe()),
        keep("statefulsets", api(client, options), ours(), sets, healths(), again.subscribe()),
        keep("services", api(client, options), ours(), services, healths(), again.subscribe()),
        keep("poddisruptionbudgets", api(client, options), ours(), budgets, healths(), again.subscribe()),
        keep("configmaps", api(client, options), all(), configs, healths(), again.subscribe()),
        async {
            // A controller of one namespace has no right to list nodes.
            let one = ListParams::default().limit(1);
            let all_nodes = Api::<Node>::all(client.clone());
            let allowed = in_time(LOOK_MAX, async { all_nodes.list_metadata(&one).await }).await;
            match (allowed, &options.namespace) {
                (Err(kube::Error::Api(status)), Some(_)) if status.code == 403 => {
                    std::future::pending().await
                }
                _ => {
                    keep("nodes", Api::all(client.clone()), all(), nodes, healths(), again.subscribe()).await
                }
            }
        },
    );
}

const KAITO_IS_HERE: &str = "KAITO's controller is installed: Workspaces are left to it";

/// Reacts when KAITO or Karpenter is installed or removed: watches node claims if there can be any, and reconciles
/// every Workspace again.
async fn follow_presence(context: &Arc<Context>, again: &watch::Sender<u64>, report: &Report) {
    let mut presence = context.presence.subscribe();
    let mut before = *presence.borrow_and_update();
    loop {
        let watched = async {
            let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={MANAGER}"));
            let sink = |event: watcher::Event<DynamicObject>| {
                let event = event.modify(|claim| claim.metadata.managed_fields = None);
                let owners = context.claims.take(event, nodes::owner, same_version);
                owners.iter().for_each(|owner| context.triggers.look_at(owner));
            };
            match before.provider {
                nodes::Provider::None => std::future::pending().await,
                provider => {
                    let api = nodes::api(&context.client, provider);
                    keep("node claims", api, ours, sink, context.healths.clone(), again.subscribe()).await;
                }
            }
        };
        tokio::select! {
            () = watched => {}
            changed = presence.changed() => if changed.is_err() { return },
        }
        let now = *presence.borrow_and_update();
        match (before.kaito, now.kaito) {
            (false, true) => report.warn(Stage::Plan, KAITO_IS_HERE),
            (true, false) => {
                report.note(Stage::Plan, "KAITO's controller is gone: this controller reconciles Workspaces")
            }
            _ => {}
        }
        if before.provider != now.provider {
            context.healths.forget("node claims");
            for event in [watcher::Event::Init, watcher::Event::InitDone] {
                context.claims.take(event, nodes::owner, same_version);
            }
            report.note(Stage::Plan, format!("nodes are requested through: {}", now.provider.name()));
        }
        before = now;
        context.look_at_all();
    }
}

/// Removes the parts of a Job that the controller does not read.
fn strip_job(job: &mut Job) {
    job.metadata.managed_fields = None;
    if let Some(spec) = job.spec.as_mut() {
        spec.template = PodTemplateSpec::default();
    }
}

/// Removes the parts of a StatefulSet that the controller does not read.
fn strip_set(set: &mut StatefulSet) {
    set.metadata.managed_fields = None;
    if let Some(spec) = set.spec.as_mut() {
        spec.template = PodTemplateSpec::default();
    }
}

/// Removes the parts of a pod that the controller does not read.
fn strip_pod(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    if let Some(spec) = pod.spec.as_mut() {
        *spec =
            k8s_openapi::api::core::v1::PodSpec { node_name: spec.node_name.take(), ..Default::default() };
    }
}

fn api<K>(client: &Client, options: &Options) -> Api<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    match &options.namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn labelled<K: ResourceExt>(object: &K) -> Option<Owner> {
    Some((object.namespace()?, object.labels().get(WORKSPACE_LABEL)?.clone()))
}

fn own_name<K: ResourceExt>(object: &K) -> Option<Owner> {
    Some((object.namespace()?, object.name_any()))
}

/// Reconciles the Workspaces that serve the image of a tuning Workspace.
fn look_at_followers(tuning: &Workspace, context: &Context) {
    for workspace in context.workspaces.state() {
        if workspace.namespace() == tuning.namespace() && serve::follows(&workspace, tuning.name()) {
            context.triggers.look_at(&owner_of(&workspace));
        }
    }
}

/// Reconciles the Workspaces that a ConfigMap configures. The ConfigMap's labels do not name them.
fn of_config((namespace, name): &Owner, context: &Context) {
    for workspace in context.workspaces.state() {
        // A change of the servers' own ConfigMap is reverted.
        let own = workspace.inference.is_some() && *name == adapters_name(&workspace);
        if workspace.namespace() == namespace && (own || config_name(&workspace) == *name) {
            context.triggers.look_at(&owner_of(&workspace));
        }
    }
}

fn answers(
    metrics: Arc<Metrics>,
    healths: Healths,
    troubles: Vec<Arc<Mutex<Option<String>>>>,
) -> endpoint::Answer {
    Arc::new(move |asked| match asked.path {
        "/healthz" => Reply::text("ok\n"),
        "/readyz" => {
            match troubles.iter().find_map(|trouble| locked(trouble).clone()).or_else(|| healths.trouble()) {
                None => Reply::text("ok\n"),
                Some(why) => Reply { status: 503, ..Reply::text(why + "\n") },
            }
        }
        "/metrics" => Reply { content_type: endpoint::PROMETHEUS, ..Reply::text(metrics.text()) },
        _ => Reply::not_found(),
    })
}

fn unreachable(error: kube::Error) -> Fault {
    match &error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            Fault::auth(format!("the API server refuses: {}", status.message))
                .help("jobs/controller.yaml holds the rights it needs")
        }
        _ => {
            let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
            let causes: Vec<String> = causes.map(|cause| cause.to_string()).collect();
            let reason = causes.last().cloned().unwrap_or_else(|| error.to_string());
            Fault::network(format!("the API server cannot be reached: {reason}")).help(
                "check that the server of the kubeconfig runs, and that its address is reachable from here",
            )
        }
    }
}
