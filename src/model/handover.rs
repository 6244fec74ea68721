//! The forms of a layer's 4-bit weights -> bytes for the ranks that have not read the layer, and back.
//!
//! The ranks share the codes and scales of a weight. Its form is the rest: their sizes, and the second level of
//! double-quantised scales, which stays whole on every device.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::facts::quantization::Code;
use crate::fault::{Fault, Kind, Result};
use crate::ops::four_bit::{Absmax, BLOCK, Expanded, FourBit};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Form {
    code: String,
    rows: usize,
    cols: usize,
    block: usize,
    /// Bytes of the codes, and of the scales.
    sizes: (usize, usize),
    second: Option<Second>,
}

/// The second level of scales, as bits of f32.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Second {
    scales: Vec<u32>,
    offset: u32,
}

/// Returns a weight that another rank reads: its shape is known, and its form is taken later.
pub(super) fn unread(rows: usize, cols: usize) -> Result<FourBit> {
    let nothing = Tensor::zeros(0, DType::U8, &Device::Cpu)?;
    let (packed, absmax) = (nothing.clone(), Absmax::Plain(nothing));
    Ok(FourBit { code: Code::Nf4, rows, cols, block: BLOCK, packed, absmax, expanded: Expanded::default() })
}

/// Returns bytes of a weight's codes and of its scales.
pub(super) fn bytes(weight: &FourBit) -> (usize, usize) {
    let scales = scales_of(weight);
    (weight.packed.elem_count(), scales.elem_count() * scales.dtype().size_in_bytes())
}

/// Returns the scales of a weight's blocks: the first level, if there are two.
pub(super) fn scales_of(weight: &FourBit) -> &Tensor {
    match &weight.absmax {
        Absmax::Plain(scales) | Absmax::Nested { codes: scales, .. } => scales,
    }
}

/// Returns the message about weights that were read: their forms.
pub(super) fn told(weights: &[&mut FourBit]) -> Result<Vec<u8>> {
    let forms = weights.iter().map(|weight| form(weight)).collect::<Result<Vec<Form>>>()?;
    Ok(serde_json::to_vec(&forms).expect("texts and numbers"))
}

fn form(weight: &FourBit) -> Result<Form> {
    let second = match &weight.absmax {
        Absmax::Plain(_) => None,
        Absmax::Nested { absmax, offset, .. } => {
            let scales = absmax.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
            let scales = scales.into_iter().map(f32::to_bits).collect();
            Some(Second { scales, offset: offset.to_bits() })
        }
    };
    let (code, sizes) = (weight.code.name().to_owned(), bytes(weight));
    Ok(Form { code, rows: weight.rows, cols: weight.cols, block: weight.block, sizes, second })
}

/// Gives the weights of a layer the forms that the rank `reader` sent. Their codes and scales stay unread.
///
/// # Errors
/// Device: that rank read another layer than this rank expects.
pub(super) fn take(reader: usize, told: &[u8], weights: Vec<&mut FourBit>, device: &Device) -> Result<()> {
    let forms: Vec<Form> = serde_json::from_slice(told)
        .map_err(|error| Fault::internal(format!("rank {reader} sent no forms of its weights: {error}")))?;
    let shapes = |forms: &[Form]| forms.iter().map(|form| [form.rows, form.cols]).collect::<Vec<_>>();
    let expected: Vec<[usize; 2]> = weights.iter().map(|weight| [weight.rows, weight.cols]).collect();
    if shapes(&forms) != expected {
        let found = shapes(&forms);
        return Err(Fault::new(
            Kind::Device,
            format!(
                "rank {reader} read a layer with 4-bit weights of the shapes {found:?}, expected {expected:?}"
            ),
        )
        .help("mount the same model on every machine"));
    }
    for (form, weight) in forms.into_iter().zip(weights) {
        let code = [Code::Nf4, Code::Fp4].into_iter().find(|code| code.name() == form.code);
        weight.code =
            code.ok_or_else(|| Fault::internal(format!("rank {reader} sent a weight of {}", form.code)))?;
        weight.block = form.block;
        // Memory without values: only its size counts until the pieces are there.
        let sized = |bytes: usize| Tensor::zeros(bytes, DType::U8, &Device::Cpu);
        weight.packed = sized(form.sizes.0)?;
        weight.absmax = match form.second {
            None => Absmax::Plain(sized(form.sizes.1)?),
            Some(Second { scales, offset }) => {
                let count = scales.len();
                let scales: Vec<f32> = scales.into_iter().map(f32::from_bits).collect();
                let absmax = Tensor::from_vec(scales, count, &Device::Cpu)?.to_device(device)?;
                Absmax::Nested { codes: sized(form.sizes.1)?, absmax, offset: f32::from_bits(offset) }
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_keeps_every_bit() {
        let values: Vec<f32> = (0..64 * 300).map(|i| (i as f32 * 0.37).sin()).collect();
        for (code, double) in [(Code::Nf4, true), (Code::Fp4, false)] {
            let mut weight = FourBit::quantize(&values, 64, 300, code, double).unwrap();
            let mut other = unread(64, 300).unwrap();
            let told = told(&[&mut weight]).unwrap();
            take(1, &told, vec![&mut other], &Device::Cpu).unwrap();
            assert_eq!(form(&other).unwrap(), form(&weight).unwrap());
            assert_eq!(other.code, code);
        }
    }

    #[test]
    fn another_layer_is_refused_with_both_shapes() {
        let mut weight = FourBit::quantize(&[1.0; 64], 2, 32, Code::Nf4, false).unwrap();
        let told = told(&[&mut weight]).unwrap();
        let mut other = unread(2, 64).unwrap();
        let fault = take(3, &told, vec![&mut other], &Device::Cpu).unwrap_err();
        assert!(fault.message.contains("rank 3 read a layer"), "{fault}");
        assert!(fault.message.contains("[[2, 32]], expected [[2, 64]]"), "{fault}");
    }
}
