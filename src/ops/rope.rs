//! Rotary position embedding in place: each pair (`x[i]`, `x[i + half]`) of a head is rotated by `position *
//! frequency[i]`.
//!
//! The pairs are split as in GPT-NeoX and HF (first half, second half), not interleaved. With a partial rotary
//! factor only the first `2 * half` elements of a head are rotated.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::facts::rope::Rope;
use crate::with_real;

const ROWS: usize = 16;

/// Cosine and sine of each row's angles, both [T, half], already multiplied by the attention factor.
#[derive(Clone, Debug)]
pub struct Angles {
    /// Cosines, [T, half].
    pub cos: Tensor,
    /// Sines, [T, half].
    pub sin: Tensor,
}

impl Angles {
    /// Returns cos and sin [T, rotary / 2] of a model's rope for rows at `positions`, on `device`. `lengths` gives the
    /// length that decides each row's scaling: the padded length of its micro-batch, which transformers uses.
    pub fn of(
        rope: &Rope,
        positions: &[u32],
        lengths: &[u32],
        dtype: DType,
        device: &Device,
    ) -> Result<Angles> {
        Angles::send(rope, positions, lengths, 0, dtype, device)?.angles()
    }

    /// Returns the same without the computation on a GPU, which `Sent::angles` asks for. The list of frequencies is
    /// filled up to `sets` sets if their number depends on the lengths.
    pub fn send(
        rope: &Rope,
        positions: &[u32],
        lengths: &[u32],
        sets_min: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Sent> {
        // Rows of an example are adjacent, so each run of equal lengths gets one set of frequencies.
        let mut frequencies = Vec::new();
        let mut sets = Vec::with_capacity(lengths.len());
        let mut last = None;
        for &length in lengths {
            if last != Some(length) && (last.is_none() || rope.depends_on_length()) {
                frequencies.extend(rope.frequencies(length as usize));
            }
            last = Some(length);
            sets.push((frequencies.len() / (rope.rotary / 2) - 1) as u32);
        }
        let (half, attention) = (rope.rotary / 2, rope.attention_factor());
        if rope.depends_on_length() {
            frequencies.resize(frequencies.len().max(sets_min * half), 0.0);
        }
        Turns { positions, sets: &sets, frequencies: &frequencies, half, attention }.send(dtype, device)
    }
}

/// The inputs of the angles on a device; on a CPU, the angles.
pub enum Sent {
    /// They are computed.
    Here(Angles),
    /// The inputs of the launch that computes them.
    #[cfg(feature = "cuda")]
    There(gpu::Turns),
}

impl Sent {
    /// Returns the angles.
    pub fn angles(&self) -> Result<Angles> {
        match self {
            Sent::Here(angles) => Ok(angles.clone()),
            #[cfg(feature = "cuda")]
            Sent::There(turns) => turns.angles(),
        }
    }
}

/// The inputs of the angles: row i rotates by set `sets[i]` of the frequencies.
#[derive(Clone, Copy, Debug)]
pub struct Turns<'a> {
    /// Position of each row in its example.
    pub positions: &'a [u32],
    /// Index of each row's set of frequencies.
    pub sets: &'a [u32],
    /// Radians per position, [sets, half].
    pub frequencies: &'a [f32],
    /// Pairs per head that are rotated.
    pub half: usize,
    /// Factor on cos and sin.
    pub attention: f32,
}

impl Turns<'_> {
    /// Computes the angles of every row on `device`; only a few numbers per row are copied to a GPU. The angles are
    /// computed in f32 like the reference's, then converted to `dtype` on a CPU; a GPU's stay f32.
    pub fn angles(&self, dtype: DType, device: &Device) -> Result<Angles> {
        self.send(dtype, device)?.angles()
    }

    fn send(&self, dtype: DType, device: &Device) -> Result<Sent> {
        let (rows, half) = (self.positions.len(), self.half);
        let sets = self.frequencies.len() / half.max(1);
        let known = self.sets.iter().all(|&set| (set as usize) < sets);
        assert!(
            self.sets.len() == rows && known,
            "a set of frequencies below {sets} for each of {rows} rows"
        );
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return gpu::Turns::send(self, device).map(Sent::There);
        }
        let mut cos = Vec::with_capacity(rows * half);
        let mut sin = Vec::with_capacity(rows * half);
        for (&position, &set) in self.positions.iter().zip(self.sets) {
            for frequency in &self.frequencies[set as usize * half..][..half] {
                let angle = position as f32 * frequency;
                cos.push(angle.cos() * self.attention);
                sin.push(angle.sin() * self.attention);
            }
        }
        let tensor = |values| Tensor::from_vec(values, (rows, half), device)?.to_dtype(dtype);
        Ok(Sent::Here(Angles { cos: tensor(cos)?, sin: tensor(sin)? }))
    }
}

/// The direction of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Rotates queries and keys.
    Forward,
    /// Applies the transpose of the rotation, which maps gradients back.
    Backward,
}

/// Returns the definition on x [T, heads, width], in differentiable primitives.
pub fn formula(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let half = angles.cos.dim(1)?;
    let (cos, sin) = (angles.cos.unsqueeze(1)?, angles.sin.unsqueeze(1)?); // [T, 1, half]
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let rest = x.dim(2)? - 2 * half;
    Tensor::cat(&[turned_a, turned_b, x.narrow(2, 2 * half, rest)?.contiguous()?], 2)
}

/// Rotates the first `heads` heads of `width` columns in each row of x [T, any], in place.
pub fn rotate(x: &Tensor, heads: usize, width: usize, angles: &Angles, direction: Direction) -> Result<()> {
    let (rows, stride) = x.dims2()?;
    let (angle_rows, half) = angles.cos.dims2()?;
    assert!(heads * width <= stride && 2 * half <= width && angle_rows == rows, "rope on [{rows}, {stride}]");
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::rotate(x, heads, width, angles, direction);
    }
    with_real!(x, T => {
        let sign = if direction == Direction::Forward { T::ONE } else { -T::ONE };
        let (cos, sin) = (&*cpu::read::<T>(&angles.cos)?, &*cpu::read::<T>(&angles.sin)?);
        cpu::edit(x, |x: &mut [T]| {
            let angles = cos.par_chunks(ROWS * half).zip(sin.par_chunks(ROWS * half));
            x.par_chunks_mut(ROWS * stride).zip(angles).for_each(|(x, (cos, sin))| {
                cpu::vectorized(#[inline(always)] || {
                    for ((x, cos), sin) in x.chunks_mut(stride).zip(cos.chunks(half)).zip(sin.chunks(half)) {
                        for head in x[..heads * width].chunks_mut(width) {
                            turn(head, cos, sin, sign);
                        }
                    }
                })
            })
        })
    })
}

#[inline(always)]
fn turn<T: Real>(head: &mut [T], cos: &[T], sin: &[T], sign: T) {
    let (a, b) = head.split_at_mut(cos.len());
    for i in 0..cos.len() {
        let (x, y, sine) = (a[i], b[i], sin[i] * sign);
        a[i] = x * cos[i] - y * sine;
        b[i] = y * cos[i] + x * sine;
    }
}

/// The launches of `kernels/rope.cu`: one block per row; angles are f32.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::{self, Launch};

    /// `super::Turns`, copied to the GPU.
    pub struct Turns {
        positions: Tensor,
        sets: Tensor,
        frequencies: Tensor,
        half: usize,
        attention: f32,
    }

    impl Turns {
        /// Copies them.
        pub fn send(turns: &super::Turns, device: &Device) -> Result<Turns> {
            Ok(Turns {
                positions: cuda::upload(turns.positions, device)?,
                sets: cuda::upload(turns.sets, device)?,
                frequencies: cuda::upload(turns.frequencies, device)?,
                half: turns.half,
                attention: turns.attention,
            })
        }

        /// Returns the cosines and sines of all rotations, computed on the GPU.
        pub fn angles(&self) -> Result<Angles> {
            let (rows, half, device) = (self.positions.elem_count(), self.half, self.positions.device());
            let cos = crate::ops::unwritten((rows, half), DType::F32, device)?;
            let sin = crate::ops::unwritten((rows, half), DType::F32, device)?;
            let launch = Launch::untyped(cuda::device(&cos)?, "rope", "angles");
            let launch = launch.of(DType::U32, &self.positions).of(DType::U32, &self.sets);
            let launch = launch.of(DType::F32, &self.frequencies).float(self.attention.into());
            launch.tensor(&cos).tensor(&sin).int(half).launch((rows, 1, 1), 64, 0)?;
            Ok(Angles { cos, sin })
        }
    }

    /// Rotates the first heads of each row, in place.
    pub fn rotate(
        x: &Tensor,
        heads: usize,
        width: usize,
        angles: &Angles,
        direction: Direction,
    ) -> Result<()> {
        let ((rows, stride), (_, half)) = (x.dims2()?, angles.cos.dims2()?);
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        let launch = Launch::new(x, "rope", "rotate")?.tensor(x);
        let launch = launch.of(DType::F32, &angles.cos).of(DType::F32, &angles.sin);
        let launch = launch.int(stride).int(heads).int(width).int(half).float(sign);
        launch.launch((rows, 1, 1), 128, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, heads, width, half, stride) in CASES.into_iter().chain([(3, 5, 96, 48, 544)]) {
                let positions: Vec<u32> = (0..rows as u32).map(|row| row * 4099).collect();
                let sets: Vec<u32> = (0..rows as u32).map(|row| row % 2).collect();
                let frequencies: Vec<f32> =
                    (0..2 * half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
                let (positions, sets, frequencies) = (&positions[..], &sets[..], &frequencies[..]);
                let turns = Turns { positions, sets, frequencies, half, attention: 1.19 };
                let expected = turns.angles(DType::F64, &Device::Cpu)?;
                let found = turns.angles(gpu.dtype, &gpu.device)?;
                // TOLERANCE: both sides have f32 cosines and sines of the same f32 angles, up to 130,000 radians.
                gpu.within(1e-6, &found.cos, &expected.cos)?;
                gpu.within(1e-6, &found.sin, &expected.sin)?;
                for direction in [Direction::Forward, Direction::Backward] {
                    let x = gpu.random((rows, stride), 1)?;
                    let y = gpu.put(&x)?;
                    rotate(&y, heads, width, &found, direction)?;
                    let turned = x.copy()?;
                    rotate(&turned, heads, width, &expected, direction)?;
                    gpu.same(&y, &turned)?;
                }
            }
            Ok(())
        })
    }

    /// (rows, heads, width, half, rows' stride): full and partial rotation, odd sizes.
    const CASES: [(usize, usize, usize, usize, usize); 3] =
        [(1, 1, 2, 1, 2), (5, 3, 8, 3, 29), (33, 4, 16, 8, 96)];

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, heads, width, half, stride) in CASES {
            let x = judge::random((rows, stride), 1)?;
            let theta = judge::random((rows, half), 2)?;
            let angles = Angles { cos: theta.cos()?.detach(), sin: theta.sin()?.detach() };
            let turned = |x: &Tensor| -> Result<Tensor> {
                let part = x.narrow(1, 0, heads * width)?.contiguous()?.reshape((rows, heads, width))?;
                let part = formula(&part, &angles)?.reshape((rows, heads * width))?;
                Tensor::cat(&[&part, &x.narrow(1, heads * width, stride - heads * width)?.contiguous()?], 1)
            };
            let y = x.copy()?;
            rotate(&y, heads, width, &angles, Direction::Forward)?;
            judge::same(&y, &turned(&x)?, 1e-12)?;
            let dy = judge::random((rows, stride), 3)?;
            let dx = dy.copy()?;
            rotate(&dx, heads, width, &angles, Direction::Backward)?;
            judge::same(&dx, &judge::gradient(&x, &turned(&x)?, &dy)?, 1e-12)?;
        }
        Ok(())
    }
}
