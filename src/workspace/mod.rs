//! A Workspace that tunes or serves -> its objects, or why there are none. Pure: no cluster and no network is asked.
//!
//! `kind` has the types that users write, `annotations` the further settings, `yaml` reads files, and `validate` has
//! the rules. `render` makes the Job. `request` builds the container's `hone run` and plans it here, so that mistakes
//! are reported before the pod starts. `needs` computes GPUs, memory and disk, `pod` makes the container and the
//! volumes, and `several` the additions of a Job on several nodes. `serve` makes the objects of servers, by the
//! configuration that `inference` reads. `hone render` prints the objects that `hone controller` applies.

pub mod adapters;
pub mod annotations;
pub mod crd;
pub mod kind;
mod schemas;
pub mod files;
pub mod inference;
mod marks;
mod needs;
mod pod;
mod render;
mod request;
pub mod serve;
pub mod several;
mod templates;
pub mod tune;
pub mod validate;
pub mod yaml;

pub use kind::Workspace;
pub use marks::owner;
pub use render::{Asked, Rendered, inputs_hash, render};
pub use templates::{CONFIG_FILE, Method, config_map, config_name};

/// Label of every object that hone makes.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Value of that label.
pub const MANAGER: &str = "hone";
/// KAITO's label of every object that belongs to a Workspace.
pub const WORKSPACE_LABEL: &str = "kaito.sh/workspace";
/// KAITO's annotation of a Job, and of a Workspace.
pub const REVISION: &str = "workspace.kaito.io/revision";

/// The cluster's settings for hone. The command line fills them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// The image of hone; unset: `hone:cuda`, or `hone:cpu` without GPUs, as README builds them.
    pub image: Option<String>,
    /// GPUs of a pod in place of its instance type's.
    pub gpus: Option<u32>,
    /// The cloud; unset: derived from the instance type.
    pub cloud: Option<Cloud>,
}

/// The cloud of the nodes. It decides about tolerations and node claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloud {
    /// Azure, with its GPU provisioner.
    Azure,
    /// AWS, with Karpenter.
    Aws,
    /// Any other cloud, and machines of one's own.
    Other,
}

impl Cloud {
    /// All clouds.
    pub const ALL: [Cloud; 3] = [Cloud::Azure, Cloud::Aws, Cloud::Other];

    /// Returns the value of `--cloud`.
    pub fn name(self) -> &'static str {
        match self {
            Cloud::Azure => "azure",
            Cloud::Aws => "aws",
            Cloud::Other => "other",
        }
    }

    /// Reads the value of `--cloud`.
    pub fn named(name: &str) -> Option<Cloud> {
        Cloud::ALL.into_iter().find(|cloud| cloud.name() == name)
    }

    /// Returns the cloud of an instance type. Azure's types are `Standard_...`, AWS's `family.size`.
    pub fn of_instance(instance: &str) -> Cloud {
        match instance {
            _ if instance.starts_with("Standard_") => Cloud::Azure,
            _ if instance.contains('.') => Cloud::Aws,
            _ => Cloud::Other,
        }
    }
}
