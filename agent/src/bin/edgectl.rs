//! `edgectl`.

fn main() -> std::process::ExitCode {
    edged::cli::run()
}
