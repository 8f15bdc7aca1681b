//! Whether the built-in base is there to be built in.

fn main() {
    let weights = "../../configs/models/nano/model.safetensors";
    println!("cargo::rustc-check-cfg=cfg(nano)");
    println!("cargo::rerun-if-changed={weights}");
    if std::path::Path::new(weights).exists() {
        println!("cargo::rustc-cfg=nano");
    }
}
