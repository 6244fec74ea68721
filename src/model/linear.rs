//! A frozen linear layer with its LoRA pair: `y = factor * x W^T + bias + scale * dropout(x) A^T B^T`.

use candle_core::{Result, Tensor};

use crate::facts::Precision;
use crate::ops::matmul::{self, Weight};
use crate::ops::{bias, dropout, unwritten};

/// What a pass over one batch shares.
pub struct Pass<'a> {
    pub precision: Precision,
    /// Row keys when training with dropout; `None` in evaluation.
    pub dropout_keys: Option<&'a Tensor>,
}

#[derive(Clone, Debug)]
pub struct Linear {
    pub weight: Weight,
    /// The model's own factor on the output; bias and LoRA's scale hold it already.
    pub factor: f64,
    pub bias: Option<Tensor>,
    pub lora: Option<Lora>,
}

/// A pair and its gradients: views into the flat buffers.
#[derive(Clone, Debug)]
pub struct Lora {
    /// [R, K] and [N, R].
    pub a: Weight,
    pub b: Weight,
    pub grad_a: Tensor,
    pub grad_b: Tensor,
    pub scale: f64,
    pub dropout: f64,
    /// Distinguishes this layer's dropout masks from the others'.
    pub site: u64,
}

impl Linear {
    /// Writes y[:, at..at+N], or adds to it. Returns `dropout(x) A^T` [T, R] for the backward pass.
    pub fn forward(
        &self,
        x: &Tensor,
        y: &Tensor,
        at: usize,
        add: bool,
        pass: &Pass,
    ) -> Result<Option<Tensor>> {
        let mut beta = if add { 1.0 } else { 0.0 };
        if let Some(bias) = &self.bias {
            bias::apply(bias, y, at, add)?;
            beta = 1.0;
        }
        matmul::forward(x, &self.weight, self.factor, y, at, beta, pass.precision)?;
        let Some(lora) = &self.lora else { return Ok(None) };
        let down = lora.down(&lora.input(x, pass)?, pass)?;
        matmul::forward(&down, &lora.b, lora.scale, y, at, 1.0, pass.precision)?;
        Ok(Some(down))
    }

    /// Adds the pair's gradients to the flat buffer and, where wanted, x's gradient to or into `dx` [T, K].
    /// `down` is what `forward` returned; without it, it is computed again.
    pub fn backward(
        &self,
        dy: &Tensor,
        at: usize,
        x: &Tensor,
        down: Option<&Tensor>,
        dx: Option<(&Tensor, bool)>,
        pass: &Pass,
    ) -> Result<()> {
        if let Some((dx, add)) = dx {
            let beta = if add { 1.0 } else { 0.0 };
            matmul::input_gradient(dy, at, &self.weight, self.factor, dx, beta, pass.precision)?;
        }
        match &self.lora {
            Some(lora) => lora.backward(dy, at, x, down, dx.map(|(dx, _)| dx), pass),
            None => Ok(()),
        }
    }
}

impl Lora {
    fn input(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        match pass.dropout_keys {
            Some(keys) if self.dropout > 0.0 => dropout::apply(x, self.dropout, keys, self.site),
            _ => Ok(x.clone()),
        }
    }

    fn down(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let down = unwritten((x.dim(0)?, self.a.dims().0), x.dtype(), x.device())?;
        matmul::forward(x, &self.a, 1.0, &down, 0, 0.0, pass.precision)?;
        Ok(down)
    }

    fn backward(
        &self,
        dy: &Tensor,
        at: usize,
        x: &Tensor,
        down: Option<&Tensor>,
        dx: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<()> {
        let x = self.input(x, pass)?;
        let down = match down {
            Some(down) => down.clone(),
            None => self.down(&x, pass)?,
        };
        matmul::weight_gradient(dy, at, &down, self.scale, &self.grad_b, pass.precision)?;
        let up = unwritten((x.dim(0)?, self.a.dims().0), x.dtype(), x.device())?; // scale * dy B, [T, R]
        matmul::input_gradient(dy, at, &self.b, self.scale, &up, 0.0, pass.precision)?;
        matmul::weight_gradient(&up, 0, &x, 1.0, &self.grad_a, pass.precision)?;
        match (dx, pass.dropout_keys) {
            (None, _) => Ok(()),
            (Some(dx), Some(keys)) if self.dropout > 0.0 => {
                let through = unwritten(dx.shape(), dx.dtype(), dx.device())?;
                matmul::input_gradient(&up, 0, &self.a, 1.0, &through, 0.0, pass.precision)?;
                crate::ops::rows::add(dx, &dropout::apply(&through, self.dropout, keys, self.site)?)
            }
            (Some(dx), _) => matmul::input_gradient(&up, 0, &self.a, 1.0, dx, 1.0, pass.precision),
        }
    }
}
