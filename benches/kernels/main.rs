//! Runs every kernel through its operation, at the shapes of real models, on the GPU: whether it is right, and how
//! fast it is.
//!
//! `cargo bench --features cuda --bench kernels -- check [--small] [--only NAME] [--out JSON]`: fresh random
//! inputs, with outputs in memory that held NaN. Chosen rows are compared with the operation's f64 form on the CPU
//! (which the library's tests compare with its formula), and each case runs twice. `... -- time ...`: the median of
//! 20, with inputs that rotate through more than the cache, beside the roof of the same minute: the rate of a copy
//! and of a large bf16 product. `--small` is for the fake driver of `kernels/driver`; it shows that everything
//! runs.

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod case;
#[cfg(feature = "cuda")]
mod products;
#[cfg(feature = "cuda")]
mod roof;
#[cfg(feature = "cuda")]
mod rows;
#[cfg(feature = "cuda")]
mod shapes;

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("kernels: this build has none; add --features cuda");
}

#[cfg(feature = "cuda")]
fn main() -> candle_core::Result<()> {
    use candle_core::DType;

    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).cloned()
    };
    let (check, time) = (flag("check"), flag("time"));
    if check == time {
        // `cargo test --all-targets` and `cargo bench` start it without arguments.
        println!(
            "kernels check|time [--small] [--only NAME] [--out JSON]: see the head of benches/kernels/main.rs"
        );
        return Ok(());
    }
    let device = hone::ops::cuda::device::open(0).map_err(candle_core::Error::wrap)?;
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64);
    case::SEED.store(seed, std::sync::atomic::Ordering::Relaxed);
    let gpu = |dtype| case::Gpu { device: device.clone(), dtype, small: flag("--small") };
    let only = value("--only");
    let wanted = |case: &case::Case| only.as_ref().is_none_or(|only| case.name.contains(only.as_str()));
    let mut results = serde_json::json!({ "seed": seed, "cases": [] });
    let keep = |results: &mut serde_json::Value, found: serde_json::Value| {
        println!("{found}");
        results["cases"].as_array_mut().expect("a list").push(found);
        match value("--out") {
            // Written after each case, so that results stay if time runs out.
            Some(file) => std::fs::write(file, results.to_string()),
            None => Ok(()),
        }
    };
    let mut wrong = 0;
    if check {
        for dtype in [DType::BF16, DType::F32] {
            for case in shapes::cases(&gpu(dtype)).iter().filter(|case| wanted(case)) {
                let found = case.check(&gpu(dtype));
                wrong += usize::from(found["flag"] != "");
                keep(&mut results, found)?;
            }
        }
    } else {
        let gpu = gpu(DType::BF16);
        let roof = roof::measure(&gpu)?;
        results["copy_bytes_per_second"] = roof.copy.into();
        results["matrix_flops_per_second"] = roof.matrix.into();
        for case in shapes::cases(&gpu).iter().filter(|case| wanted(case)) {
            let found = case.time(&gpu, &roof);
            wrong += usize::from(found["error"].is_string());
            keep(&mut results, found)?;
        }
    }
    if results["cases"].as_array().is_some_and(Vec::is_empty) {
        let note = format!("no case of this card has {:?} in its name", only.unwrap_or_default());
        println!("{note}");
        results["note"] = note.into();
        if let Some(file) = value("--out") {
            std::fs::write(file, results.to_string())?;
        }
    }
    match wrong {
        0 => Ok(()),
        _ => Err(candle_core::Error::Msg(format!("{wrong} cases are wrong"))),
    }
}
