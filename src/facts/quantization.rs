//! The storage of the base's linear layers: the user's choice, or the form of a checkpoint that was quantised already.

use crate::fault::{Fault, Result};

use super::config::Config;

const ORIGINAL: &str =
    "use the model it was made from (base_model on its hub page); hone quantises it itself";

/// The storage of the base's linear layers, in bitsandbytes' formats. Weights that hone quantises have blocks of
/// 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// Not quantised.
    None,
    /// hone quantises the weights to 4 bits when it loads them.
    FourBit {
        /// The 16 values.
        code: Code,
        /// Whether the scales are quantised too.
        double: bool,
    },
    /// The checkpoint was quantised by bitsandbytes. Its weights are used as they are.
    Stored {
        /// The 16 values.
        code: Code,
        /// Whether the scales are quantised too.
        double: bool,
    },
}

/// The 16 values that 4-bit indices stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// 16 quantiles of a normal distribution, ascending.
    Nf4,
    /// Sign, two exponent bits, one fraction bit. The values follow the bit patterns and are not ascending.
    Fp4,
}

impl Code {
    /// Returns the name in bitsandbytes' configuration.
    pub fn name(self) -> &'static str {
        match self {
            Code::Nf4 => "nf4",
            Code::Fp4 => "fp4",
        }
    }
}

/// Reads how the checkpoint is quantised from `quantization_config`. Anything but bitsandbytes with 4 bits is a
/// model fault.
pub fn read(config: &Config) -> Result<Option<Quantization>> {
    let config = config.language_part()?;
    let Some(section) = config.nonempty_section("quantization_config")? else { return Ok(None) };
    let method = section.text("quant_method")?.unwrap_or_else(|| "bitsandbytes".into());
    let eight = section.flag("load_in_8bit")? || section.flag("_load_in_8bit")?;
    let four = section.flag("load_in_4bit")? || section.flag("_load_in_4bit")?;
    match (method.as_str(), eight, four) {
        ("bitsandbytes", false, true) => {
            let code = match section.text("bnb_4bit_quant_type")?.as_deref() {
                Some("nf4") => Code::Nf4,
                None | Some("fp4") => Code::Fp4,
                Some(_) => return Err(section.refuse("bnb_4bit_quant_type", "nf4 or fp4")),
            };
            Ok(Some(Quantization::Stored { code, double: section.flag("bnb_4bit_use_double_quant")? }))
        }
        ("bitsandbytes", true, _) => Err(refused("bitsandbytes to 8 bits", ORIGINAL)),
        ("bitsandbytes", false, false) => Err(section.refuse("load_in_4bit", "true")),
        ("mxfp4" | "fp8" | "fbgemm_fp8", _, _) => Err(refused(
            &method,
            "use a bf16 copy of the model, which its makers or others often publish; hone quantises it itself",
        )),
        _ => Err(refused(&method, ORIGINAL)),
    }
}

fn refused(by: &str, help: &str) -> Fault {
    Fault::model(format!(
        "config.json: quantization_config: the checkpoint is quantised by {by}, expected f32, f16 or bf16 weights, \
         or 4-bit weights from bitsandbytes"
    ))
    .help(help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn golden(case: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case).join("model")
    }

    fn config(section: serde_json::Value) -> Config {
        let json = serde_json::json!({"model_type": "llama", "quantization_config": section});
        Config::from_json(json.as_object().expect("an object").clone())
    }

    #[test]
    fn what_config_json_says_is_read_and_other_quantisers_are_refused_by_name() {
        let nf4 = read(&Config::read(&golden("llama_stored_nf4")).unwrap()).unwrap();
        assert_eq!(nf4, Some(Quantization::Stored { code: Code::Nf4, double: true }));
        let fp4 = read(&Config::read(&golden("llama_stored_fp4")).unwrap()).unwrap();
        assert_eq!(fp4, Some(Quantization::Stored { code: Code::Fp4, double: false }));
        assert_eq!(read(&Config::read(&golden("llama3")).unwrap()).unwrap(), None);
        for method in ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"] {
            let fault = read(&config(serde_json::json!({"quant_method": method}))).unwrap_err();
            assert!(fault.message.contains(&format!("quantised by {method},")), "{fault}");
            assert!(fault.help.is_some());
        }
        let eight = serde_json::json!({"quant_method": "bitsandbytes", "load_in_8bit": true});
        assert!(read(&config(eight)).unwrap_err().message.contains("to 8 bits"));
    }
}
