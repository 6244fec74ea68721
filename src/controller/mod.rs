//! `hone controller`: Workspaces that tune -> Jobs, and what becomes of them -> the Workspaces' status.
//!
//! Level-triggered: every look starts from what there is (`reconcile`), so that nothing is lost with the process. `observe` and
//! `status` are pure; `revision`, `nodes` and `lease` each keep one kind of object; `install` is what a cluster needs to run it.

pub mod install;
mod lease;
mod metrics;
mod nodes;
mod observe;
mod progress;
mod reconcile;
mod revision;
mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::PartialObjectMeta;
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::watch;

use crate::endpoint::{self, Reply};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage};
use crate::source;
use crate::workspace::{MANAGED_BY, MANAGER, Settings, WORKSPACE_LABEL, Workspace, config_name};
use lease::Election;
use metrics::Metrics;
use nodes::Provider;

/// Of server-side apply.
const FIELD_MANAGER: &str = "hone-controller";
const LEASE: &str = "hone-controller";
/// KAITO's admission webhook: where it is, its controller is too.
const KAITO_WEBHOOK: &str = "validation.workspace.kaito.sh";
/// How often KAITO's arrival is looked for.
const KAITO_INTERVAL: Duration = Duration::from_secs(60);
/// Workspaces that are looked at at the same time.
const CONCURRENCY: u16 = 8;
/// After an error, and how often that doubles.
const RETRY: Duration = Duration::from_secs(2);
const RETRIES_DOUBLED: u32 = 7;

/// What `hone controller` is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Only this one's Workspaces.
    pub namespace: Option<String>,
    pub settings: Settings,
    /// Whether one of several leads; otherwise this one does what it does at once.
    pub elect: bool,
    /// Of the Lease.
    pub lease_namespace: String,
    /// Of this process.
    pub identity: String,
    /// Of health and metrics.
    pub address: SocketAddr,
}

/// What every look has.
struct Context {
    client: Client,
    settings: Settings,
    provider: Provider,
    recorder: Recorder,
    metrics: Arc<Metrics>,
    kaito: AtomicBool,
    failures: std::sync::Mutex<std::collections::HashMap<ObjectRef<Workspace>, u32>>,
}

impl Context {
    fn kaito_is_here(&self) -> bool {
        self.kaito.load(Ordering::Relaxed)
    }

    /// Doubles with each failure in a row.
    fn pause(&self, workspace: &Workspace) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let count = failures.entry(ObjectRef::from_obj(workspace)).or_default();
        *count += 1;
        RETRY * 2u32.pow((*count - 1).min(RETRIES_DOUBLED))
    }

    fn succeeded(&self, workspace: &Workspace) {
        let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        failures.remove(&ObjectRef::from_obj(workspace));
    }
}

/// Runs until a signal, or until another leads.
///
/// # Errors
/// Config: no cluster to talk to, or no right to. Network: it does not answer. Interrupted: the lead was lost, so that whoever
/// started this process starts it again.
pub fn run(options: &Options, report: &Report) -> Result<()> {
    source::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Fault::internal(format!("cannot start the network runtime: {error}")))?;
    let ended = runtime.block_on(async {
        let config = kube::Config::infer().await.map_err(|error| {
            Fault::config(format!("no cluster: {error}")).help("set KUBECONFIG, or run it inside of one")
        })?;
        let client = Client::try_from(config).map_err(unreachable)?;
        run_with(client, options, report, signal()).await
    });
    runtime.shutdown_background();
    ended
}

async fn signal() {
    while !interrupt::requested() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// As `run`, with a client and until `stop`.
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
    let (answers, ready) = watch::channel(false);
    let _endpoint = endpoint::start(options.address, endpoint(metrics.clone(), ready))?;
    let version = client.apiserver_version().await.map_err(unreachable)?;
    report.note(Stage::Plan, format!("Kubernetes {} answers", version.git_version));
    answers.send_replace(true);

    let mut election =
        Election::new(Api::namespaced(client.clone(), &options.lease_namespace), LEASE, &options.identity);
    let lead = async {
        if options.elect {
            election.won().await;
            report.note(Stage::Plan, format!("{} leads", options.identity));
        }
        metrics.leads(true);
        let context = Arc::new(context(client.clone(), options, metrics.clone()).await.map_err(unreachable)?);
        tokio::select! {
            () = control(context.clone(), options, report) => Err(Fault::internal("the controller ended")),
            () = look_for_kaito(&context, report) => unreachable!("it looks for ever"),
            () = async { if options.elect { election.lost().await } else { std::future::pending().await } } => {
                Err(Fault::new(Kind::Interrupted, "another process leads now"))
            }
        }
    };
    let ended = tokio::select! {
        ended = lead => ended,
        () = stop => Ok(()),
    };
    metrics.leads(false);
    if options.elect {
        election.release().await;
    }
    ended
}

async fn context(client: Client, options: &Options, metrics: Arc<Metrics>) -> kube::Result<Context> {
    let reporter = Reporter { controller: FIELD_MANAGER.into(), instance: Some(options.identity.clone()) };
    Ok(Context {
        provider: nodes::provider(&client).await?,
        kaito: AtomicBool::new(kaito_is_there(&client).await?),
        recorder: Recorder::new(client.clone(), reporter),
        settings: options.settings.clone(),
        failures: std::sync::Mutex::default(),
        metrics,
        client,
    })
}

async fn kaito_is_there(client: &Client) -> kube::Result<bool> {
    let webhooks = Api::<ValidatingWebhookConfiguration>::all(client.clone());
    match webhooks.get_metadata_opt(KAITO_WEBHOOK).await {
        Ok(found) => Ok(found.is_some()),
        // A controller of one namespace may not look; the finalizer still tells KAITO's Workspaces.
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(false),
        Err(error) => Err(error),
    }
}

async fn look_for_kaito(context: &Context, report: &Report) {
    loop {
        if context.kaito_is_here() {
            let told = "KAITO's controller is installed: Workspaces are left to it";
            report.warn(Stage::Plan, told);
        }
        let before = context.kaito_is_here();
        while context.kaito_is_here() == before {
            tokio::time::sleep(KAITO_INTERVAL).await;
            if let Ok(there) = kaito_is_there(&context.client).await {
                context.kaito.store(there, Ordering::Relaxed);
            }
        }
    }
}

/// Looks at each Workspace when it, its Job, one of its pods or its ConfigMap changes.
async fn control(context: Arc<Context>, options: &Options, report: &Report) {
    let client = &context.client;
    let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={MANAGER}"));
    let controller = Controller::new(api::<Workspace>(client, options), watcher::Config::default())
        .with_config(Config::default().concurrency(CONCURRENCY));
    let known = controller.store();
    let work = controller
        .owns(api::<Job>(client, options), ours.clone())
        .watches(api::<Pod>(client, options), ours, of_pod)
        .watches(
            api::<PartialObjectMeta<ConfigMap>>(client, options),
            watcher::Config::default(),
            move |map| of_config(&map, &known),
        )
        .run(look, after_error, context.clone());
    let mut work = std::pin::pin!(work);
    while let Some(done) = work.next().await {
        // Objects that are gone between the queue and the look are nothing to tell.
        if let Err(error) = done
            && !matches!(error, kube::runtime::controller::Error::ObjectNotFound(_))
        {
            report.warn(Stage::Plan, format!("{error}; it is tried again"));
        }
    }
}

async fn look(workspace: Arc<Workspace>, context: Arc<Context>) -> kube::Result<Action> {
    let action = reconcile::reconcile(workspace.clone(), context.clone()).await?;
    context.succeeded(&workspace);
    Ok(action)
}

fn after_error(workspace: Arc<Workspace>, _: &kube::Error, context: Arc<Context>) -> Action {
    Action::requeue(context.pause(&workspace))
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

fn of_pod(pod: Pod) -> Option<ObjectRef<Workspace>> {
    let name = pod.labels().get(WORKSPACE_LABEL)?;
    Some(ObjectRef::new(name).within(pod.namespace().as_deref()?))
}

/// The Workspaces that a ConfigMap configures; their labels would not tell.
fn of_config(map: &PartialObjectMeta<ConfigMap>, known: &Store<Workspace>) -> Vec<ObjectRef<Workspace>> {
    let (name, namespace) = (map.name_any(), map.namespace().unwrap_or_default());
    let named = |workspace: &Arc<Workspace>| {
        workspace.tuning.is_some() && workspace.namespace() == namespace && config_name(workspace) == name
    };
    known
        .state()
        .iter()
        .filter(|workspace| named(workspace))
        .map(|workspace| ObjectRef::from_obj(workspace.as_ref()))
        .collect()
}

fn endpoint(metrics: Arc<Metrics>, ready: watch::Receiver<bool>) -> endpoint::Answer {
    Arc::new(move |asked| match asked.path {
        "/healthz" => Reply::text("ok\n"),
        "/readyz" if *ready.borrow() => Reply::text("ok\n"),
        "/readyz" => Reply { status: 503, ..Reply::text("the API server has not answered yet\n") },
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
        _ => Fault::network(format!("the API server cannot be reached: {error}")),
    }
}
