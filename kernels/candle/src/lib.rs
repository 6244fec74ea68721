//! The interface of candle's kernel crate, version 0.11.1, without its kernels.
//!
//! candle-core's `cuda` feature needs these names to compile and link. A call of one is an error in hone: every
//! operation that hone runs on a GPU launches a kernel of `kernels/*.cu` or a cuBLAS product. If one of candle's
//! operations needs its own kernel, it ends with candle's error that the empty PTX text cannot be loaded. A direct
//! call from candle's GGUF or expert code panics.

/// One of candle's modules of kernels, identified by its place in [`ALL_IDS`].
pub struct Module {
    index: usize,
}

impl Module {
    /// Returns the place of this module in candle's table of loaded modules.
    pub fn index(&self) -> usize {
        self.index
    }

    /// PTX text: empty, so that loading the module fails.
    pub fn ptx(&self) -> &'static str {
        ""
    }
}

macro_rules! modules {
    ($($id:ident $constant:ident),* $(,)?) => {
        /// The modules of candle's crate.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Id { $(#[allow(missing_docs)] $id),* }

        /// All modules, in the order of their indices.
        pub const ALL_IDS: [Id; 11] = [$(Id::$id),*];

        $(#[allow(missing_docs)] pub const $constant: Module = Module { index: Id::$id as usize };)*
    };
}

modules! {
    Affine AFFINE, Binary BINARY, Cast CAST, Conv CONV, Fill FILL, Indexing INDEXING, Quantized QUANTIZED, Reduce REDUCE,
    Sort SORT, Ternary TERNARY, Unary UNARY,
}

/// Host functions that candle-core takes the addresses of, grouped by signature.
#[allow(missing_docs, clippy::missing_safety_doc)]
#[allow(non_snake_case)]
pub mod ffi {
    use core::ffi::c_void;

    type In = *const c_void;
    type Out = *mut c_void;

    macro_rules! absent {
        ($(($($parameter:ty),*): $($name:ident)*;)*) => { $(absent! { @each ($($parameter),*) $($name)* })* };
        (@each $parameters:tt $($name:ident)*) => { $(absent! { @one $name $parameters })* };
        (@one $name:ident ($($parameter:ty),*)) => {
            pub unsafe extern "C" fn $name($(_: $parameter),*) {
                unreachable!(concat!("candle's kernel ", stringify!($name), " is not part of hone"))
            }
        };
    }

    absent! {
        (In, In, *const i32, *const i32, *const f32, Out, *mut i32, *mut i32, i32, i32, i32, i32, i32, i32, bool, i64):
            moe_gemm_wmma;
        (*const f32, In, *const i32, *const i32, *const f32, Out, i32, i32, i32, i32, i32, i32, i64):
            moe_gemm_gguf;
        (In, *const u8, *const i32, *const i32, *const f32, Out, i32, i32, i32, i32, i32, i32, i32, i64):
            moe_gemm_gguf_prefill;
        (In, In, Out, i32, i32, i32, i32, i32, Out):
            launch_mmvq_gguf_q4_0_bf16_plain launch_mmvq_gguf_q4_1_bf16_plain launch_mmvq_gguf_q5_0_bf16_plain
            launch_mmvq_gguf_q5_1_bf16_plain launch_mmvq_gguf_q8_0_bf16_plain launch_mmvq_gguf_q2_k_bf16_plain
            launch_mmvq_gguf_q3_k_bf16_plain launch_mmvq_gguf_q4_k_bf16_plain launch_mmvq_gguf_q5_k_bf16_plain
            launch_mmvq_gguf_q6_k_bf16_plain
            launch_mmvq_gguf_q4_0_f32_plain launch_mmvq_gguf_q4_1_f32_plain launch_mmvq_gguf_q5_0_f32_plain
            launch_mmvq_gguf_q5_1_f32_plain launch_mmvq_gguf_q8_0_f32_plain launch_mmvq_gguf_q2_k_f32_plain
            launch_mmvq_gguf_q3_k_f32_plain launch_mmvq_gguf_q4_k_f32_plain launch_mmvq_gguf_q5_k_f32_plain
            launch_mmvq_gguf_q6_k_f32_plain
            launch_mmvq_gguf_q4_0_f16_plain launch_mmvq_gguf_q4_1_f16_plain launch_mmvq_gguf_q5_0_f16_plain
            launch_mmvq_gguf_q5_1_f16_plain launch_mmvq_gguf_q8_0_f16_plain launch_mmvq_gguf_q2_k_f16_plain
            launch_mmvq_gguf_q3_k_f16_plain launch_mmvq_gguf_q4_k_f16_plain launch_mmvq_gguf_q5_k_f16_plain
            launch_mmvq_gguf_q6_k_f16_plain;
        (In, Out, i32, i32, i32, Out):
            launch_mmvq_gguf_quantize_q8_1_bf16 launch_mmvq_gguf_quantize_q8_1_f16 launch_mmvq_gguf_quantize_q8_1_f32;
        (In, *const i32, Out, i32, i64, i64, i64, i64, i64, i64, i64, i64, Out):
            launch_mmq_quantize_q8_1_D4 launch_mmq_quantize_q8_1_DS4 launch_mmq_quantize_q8_1_D2S6;
        (Out, In, In, Out, i64, i64, i64, i64, i64, i32, i32, i64, i32, Out):
            launch_mmq_gguf_q4_0 launch_mmq_gguf_q4_1 launch_mmq_gguf_q5_0 launch_mmq_gguf_q5_1 launch_mmq_gguf_q8_0
            launch_mmq_gguf_q2_k launch_mmq_gguf_q3_k launch_mmq_gguf_q4_k launch_mmq_gguf_q5_k launch_mmq_gguf_q6_k;
    }
}
