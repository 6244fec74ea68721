//! Flags of the commands that push and pull an adapter's image.

use std::path::PathBuf;

use clap::Args;

use super::command::{Command, RegistryArguments};

/// Push an adapter's folder: as an image, to the hub, to an object store or to a folder
#[derive(Args)]
#[command(after_help = "Examples:\n  hone push ./adapter registry.example.com/adapters/support:1\n  \
    hone push ./adapter oci:./image\n  hone push ./adapter hf://team/support")]
pub(super) struct Push {
    /// Folder with adapter_config.json and adapter_model.safetensors
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// host/repository:tag, oci:DIR for a layout on disk, hf://OWNER/NAME, s3://BUCKET/FOLDER or file:DIR
    #[arg(value_name = "PLACE")]
    image: String,
    #[command(flatten)]
    registry: RegistryArguments,
}

impl Push {
    pub(super) fn command(self) -> Command {
        Command::Push { folder: self.folder, image: self.image, registry: self.registry }
    }
}

/// Pull an adapter's image into a folder
#[derive(Args)]
#[command(after_help = "Example:\n  hone pull registry.example.com/adapters/support:1 ./adapter")]
pub(super) struct Pull {
    /// host/repository:tag, or oci:DIR for a layout on disk
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Folder to write; must not hold another adapter
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    registry: RegistryArguments,
}

impl Pull {
    pub(super) fn command(self) -> Command {
        Command::Pull { image: self.image, folder: self.folder, registry: self.registry }
    }
}
