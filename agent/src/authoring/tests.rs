use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Parser;
use edged_model::trust::RoleName;

use super::*;
use crate::cli::args::{Args, Verb};
use crate::verify::trust as check;

/// A folder to work in, and the verbs as they are typed.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// `./NAME` stands for a file of this folder.
    fn run(&self, line: &str) -> Result<String> {
        let words = line.split(' ').map(|word| match word.strip_prefix("./") {
            Some(name) => self.path(name).display().to_string(),
            None => word.to_owned(),
        });
        match Args::try_parse_from(std::iter::once("edgectl".to_owned()).chain(words))?.verb {
            Verb::Key(verb) => verb.run(),
            Verb::Trust(verb) => verb.run(),
            Verb::Manifest(verb) => verb.run(),
            Verb::Push(verb) => verb.run(),
            other => panic!("{other:?}"),
        }
    }

    fn ok(&self, line: &str) -> String {
        self.run(line).unwrap_or_else(|error| panic!("{line}: {error:#}"))
    }

    /// What is told instead, without the folder's name.
    fn refused(&self, line: &str) -> String {
        match self.run(line) {
            Ok(text) => panic!("{line}: {text}"),
            Err(error) => format!("{error:#}").replace(&format!("{}/", self.dir.path().display()), ""),
        }
    }

    fn keys(&self, names: &[&str]) {
        for name in names {
            self.ok(&format!("key generate --out ./{name}.key"));
        }
    }

    fn mode(&self, name: &str) -> u32 {
        std::fs::metadata(self.path(name)).unwrap().permissions().mode() & 0o777
    }
}

const WEB: &str = "\
apiVersion: edge/v1
device: pump-1
sequence: 7
issued: 2026-01-01T00:00:00Z
expires: 2126-01-01T00:00:00Z
workloads:
  web:
    image: registry.example:5000/web:1
    resources:
      memory: 16Mi
      cpu: 0.5
    health:
      probe:
        http:
          port: 80
    dependsOn:
      db: healthy
  db:
    image: registry.example:5000/db:1
    resources: { memory: 16777216, cpu: 100m }
";

#[test]
fn a_key_is_made_once_and_only_its_owner_may_read_it() {
    let desk = Desk::new();
    desk.ok("key generate --out ./ops.key");
    assert_eq!((desk.mode("ops.key"), desk.mode("ops.pub")), (0o600, 0o644));
    let before = std::fs::read(desk.path("ops.key")).unwrap();

    assert_eq!(desk.refused("key generate --out ./ops.key"), "ops.key is there already; --force writes over it");
    desk.write("half.pub", "somebody's");
    assert_eq!(desk.refused("key generate --out ./half.key"), "half.pub is there already; --force writes over it");
    assert!(!desk.path("half.key").exists(), "no half pair");
    assert!(desk.refused("key generate --out ./x.pub --force").contains("give the private one another"));
    assert_eq!(std::fs::read(desk.path("ops.key")).unwrap(), before);

    // Written over, it does not inherit what others could read.
    std::fs::set_permissions(desk.path("ops.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    desk.ok("key generate --out ./ops.key --force");
    assert_eq!(desk.mode("ops.key"), 0o600);
    assert_ne!(std::fs::read(desk.path("ops.key")).unwrap(), before);
    assert_eq!(std::fs::read_dir(desk.dir.path()).unwrap().count(), 3, "nothing is left beside");
}

fn openssl(args: &[&str]) -> String {
    let output = Command::new("openssl").args(args).output().expect("openssl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn keys_go_both_ways_between_edgectl_and_openssl() {
    let desk = Desk::new();
    desk.keys(&["ours"]);
    let ours = desk.path("ours.key");
    let public = openssl(&["pkey", "-in", ours.to_str().unwrap(), "-pubout"]);
    assert_eq!(public, std::fs::read_to_string(desk.path("ours.pub")).unwrap());
    assert_eq!(public, desk.ok("key public ./ours.key"));
    assert_eq!(desk.ok("key public --id ./ours.pub"), desk.ok("key public --id ./ours.key"));

    desk.write("theirs.key", &openssl(&["genpkey", "-algorithm", "ed25519"]));
    desk.write("theirs.pub", &desk.ok("key public ./theirs.key"));
    desk.write("m.yaml", WEB);
    desk.ok("manifest sign ./m.yaml --key ./theirs.key");
    desk.ok("trust init --root-key ./ours.key --manifest-key ./theirs.pub --image-key ./theirs.pub -o ./trust.cose");
    let shown = desk.ok("manifest inspect ./m.cose --trust ./trust.cose");
    assert!(shown.contains("believed by trust root version 1"), "{shown}");
}

#[test]
fn a_trust_root_goes_from_hand_to_hand() {
    let desk = Desk::new();
    desk.keys(&["r1", "r2", "ops", "img"]);
    let roles = "--manifest-key ./ops.pub --image-key ./img.pub";
    desk.ok(&format!("trust init --root-key ./r1.key {roles} --expires 10years -o ./one.cose"));
    assert_eq!(desk.ok("trust verify ./one.cose"), "trust root version 1 is sound\n");
    assert!(desk.refused(&format!("trust init --root-key ./r1.key {roles} -o ./one.cose")).contains("there already"));

    desk.ok(&format!(
        "trust rotate --from ./one.cose --old-root-key ./r1.key --root-key ./r2.key {roles} -o ./two.cose"
    ));
    assert_eq!(desk.ok("trust verify ./two.cose --from ./one.cose"), "a device with version 1 takes version 2\n");
    assert!(desk.refused("trust verify ./one.cose --from ./two.cose").contains("version 1 is not above 2"));

    // Without the old root's key no device takes it; its holder can still add the signature.
    desk.ok(&format!(
        "trust rotate --from ./one.cose --old-root-key ./r2.key --root-key ./r2.key {roles} -o ./bare.cose"
    ));
    let told = desk.refused("trust verify ./bare.cose --from ./one.cose");
    assert!(told.contains("signed by 0 of the 1 keys of version 1's root role"), "{told}");
    desk.ok("trust sign ./bare.cose --key ./r1.key -o ./bare.cose");
    desk.ok("trust verify ./bare.cose --from ./one.cose");

    let shown = desk.ok("trust inspect ./two.cose");
    assert!(shown.contains("version 2") && shown.contains("manifest  1 of 1"), "{shown}");
    let told = desk.refused(&format!("trust init --root-key ./r1.key {roles} --manifest-threshold 2 -o ./bad.cose"));
    assert!(told.contains("role Manifest asks for 2 signatures and has 1 keys"), "{told}");
    assert!(!desk.path("bad.cose").exists());
}

/// Three holders with keys that never meet: the one who writes the document has public keys alone.
#[test]
fn signers_who_never_meet_make_a_trust_root_and_the_next_ones() {
    let desk = Desk::new();
    desk.keys(&["ann", "bob", "cy", "dee", "ops", "ops2", "img"]);
    let id = |name: &str| desk.ok(&format!("key public --id ./{name}.pub")).trim()["sha256:".len()..][..12].to_owned();
    let roots = "--root-key ./ann.pub --root-key ./bob.pub --root-key ./cy.pub --root-threshold 2";
    let said = desk.ok(&format!("trust init {roots} --manifest-key ./ops.pub --image-key ./img.pub -o ./one.cose"));
    assert!(said.contains("0 of 2 needed have signed; 2 missing of"), "{said}");
    assert!(said.contains(&id("ann")) && said.contains(&id("cy")), "{said}");
    let told = desk.refused("trust verify ./one.cose");
    assert!(told.contains("2 missing of"), "{told}");

    // Each signs a copy at home.
    for name in ["ann", "bob"] {
        desk.ok(&format!("trust sign ./one.cose --key ./{name}.key -o ./one-{name}.cose"));
    }
    let told = desk.refused("trust verify ./one-ann.cose");
    assert!(told.contains("signed by 1 of the 2 keys of its own root role"), "{told}");
    assert!(told.contains(&format!("; 1 missing of {} {}", id("bob"), id("cy"))), "{told}");
    let said = desk.ok("trust combine ./one-ann.cose ./one-bob.cose -o ./one.cose");
    assert!(said.contains(&format!("2 of 2 needed have signed ({} {})", id("ann"), id("bob"))), "{said}");
    assert_eq!(desk.ok("trust verify ./one.cose"), "trust root version 1 is sound\n");
    desk.ok(&format!("trust init {roots} --manifest-key ./ops2.pub --image-key ./img.pub -o ./other.cose"));
    assert!(desk.refused("trust combine ./one.cose ./other.cose -o ./x.cose").contains("two different documents"));

    // Bob leaves, Dee comes, the threshold stays; who has to sign is said for both versions.
    let said = desk.ok(
        "trust rotate --from ./one.cose --remove-key ./bob.pub --add-root-key ./dee.pub --expires 3years --key ./ann.key -o ./two.cose",
    );
    assert!(said.contains(&format!("root keys of version 1: 1 of 2 needed have signed ({})", id("ann"))), "{said}");
    assert!(said.contains("root keys of version 2: 1 of 2"), "{said}");
    let shown = desk.ok("trust inspect ./two.cose --from ./one.cose");
    assert!(shown.contains(&format!("- root key {}", desk.ok("key public --id ./bob.pub").trim())), "{shown}");
    assert!(shown.contains("+ root key") && !shown.contains("threshold 2 ->"), "{shown}");
    // Dee's word is enough for the new version, and none for the old.
    desk.ok("trust sign ./two.cose --key ./dee.key");
    let told = desk.refused("trust verify ./two.cose --from ./one.cose");
    assert!(
        told.contains("root keys of version 1: 1 of 2") && told.contains("root keys of version 2: 2 of 2"),
        "{told}"
    );
    desk.ok("trust sign ./two.cose --key ./cy.key");
    assert_eq!(desk.ok("trust verify ./two.cose --from ./one.cose"), "a device with version 1 takes version 2\n");

    // A third one changes a threshold and the manifest keys alone; a device that has the first takes all in one go.
    let said = desk.ok(
        "trust rotate --from ./two.cose --add-manifest-key ./ops2.pub --manifest-threshold 2 --key ./ann.key --key ./cy.key -o ./three.cose",
    );
    assert!(said.contains("root keys of version 3: 2 of 2"), "{said}");
    assert_eq!(desk.ok("trust verify ./one.cose ./two.cose ./three.cose"), "a device with version 1 takes version 3\n");
    assert!(desk.refused("trust verify ./one.cose ./three.cose ./two.cose").contains("version 2 is not above 3"));
    let shown = desk.ok("trust inspect ./three.cose");
    assert!(shown.contains("manifest  2 of 2") && shown.contains("root      2 of 3"), "{shown}");

    for (line, why) in [
        ("--remove-key 00000000", "neither a file nor the id"),
        ("--remove-key ./ops2.pub", "is in no role"),
        ("--remove-key ./ops.pub", "role Manifest asks for 1 signatures and has 0 keys"),
        ("--root-threshold 4", "asks for 4 signatures and has 3 keys"),
        ("--add-manifest-key ./ops2.key", "give its public half"),
        ("--add-root-key ./one.cose", "one.cose"),
    ] {
        let told = desk.refused(&format!("trust rotate --from ./one.cose {line} -o ./never.cose"));
        assert!(told.contains(why), "{line}: {told}");
    }
    desk.write("half.cose", "x");
    assert!(desk.refused("trust rotate --from ./half.cose -o ./never.cose").contains("half.cose"));
    assert!(!desk.path("never.cose").exists());
}

#[test]
fn rules_for_images_are_part_of_a_trust_root() {
    let desk = Desk::new();
    desk.keys(&["root", "ops", "img", "base", "base2"]);
    let roles = "--root-key ./root.key --manifest-key ./ops.pub --image-key ./img.pub";
    desk.write(
        "policy.yaml",
        "rules:
- { prefix: registry.example/base, require: signature, keys: [base.pub, base2.pub], threshold: 2, identity: registry.example/base }
- { prefix: registry.example/cache, require: digest }
- { prefix: '', require: signature, annotations: { team: pumps } }
",
    );
    desk.ok(&format!("trust init {roles} --image-policy ./policy.yaml -o ./one.cose"));
    let shown = desk.ok("trust inspect ./one.cose");
    assert!(shown.contains("images    registry.example/base: signed by 2 of "), "{shown}");
    assert!(shown.contains(" for registry.example/base\n"), "{shown}");
    assert!(shown.contains("images    registry.example/cache: a digest in the manifest is enough\n"), "{shown}");
    assert!(shown.contains("images    any: signed by image keys with team=pumps\n"), "{shown}");
    let root = check::factory(&read(&desk.path("one.cose")).unwrap()).unwrap();
    assert_eq!((root.images.len(), root.keys.len()), (3, 5));

    // They stay when nothing is said of them, and go when they are replaced.
    desk.ok("trust rotate --from ./one.cose --key ./root.key -o ./two.cose");
    assert_eq!(check::factory(&read(&desk.path("two.cose")).unwrap()).unwrap().images, root.images);
    desk.write("none.toml", "rules = []\n");
    desk.ok("trust rotate --from ./two.cose --key ./root.key --image-policy ./none.toml -o ./three.cose");
    let shown = desk.ok("trust inspect ./three.cose --from ./two.cose");
    assert!(shown.contains("- images registry.example/cache"), "{shown}");
    let last = check::factory(&read(&desk.path("three.cose")).unwrap()).unwrap();
    assert_eq!((last.images.len(), last.keys.len()), (0, 3), "and their keys with them");

    // A key that goes takes no rule's place silently.
    let told = desk.refused("trust rotate --from ./one.cose --remove-key ./base.pub -o ./x.cose");
    assert!(told.contains("asks for 2 signatures and has 1 keys"), "{told}");
    for (rules, why) in [
        ("rules:\n- { prefix: a, require: often }", "often"),
        ("rules:\n- { prefix: a, require: signature, kyes: [] }", "did you mean `keys`?"),
        ("rules:\n- { prefix: a, require: signature, keys: [nobody.pub] }", "nobody.pub is neither a file"),
        ("rules:\n- { prefix: a, require: signature, keys: [base.key] }", "give its public half"),
        ("rules:\n- { prefix: a, require: digest, keys: [base.pub] }", "asks for no signature, and yet"),
        ("rules:\n- { prefix: a, require: digest }\n- { prefix: a, require: digest }", "is there twice"),
    ] {
        desk.write("bad.yaml", rules);
        let told = desk.refused(&format!("trust init {roles} --image-policy ./bad.yaml -o ./x.cose"));
        assert!(told.contains(why), "{rules}: {told}");
    }
    desk.write("one.yaml", "rules:\n- { prefix: a, require: signature, keys: [base.pub] }\n");
    desk.ok(&format!("trust init {roles} --image-policy ./one.yaml -o ./single.cose"));
    let told = desk.refused("trust rotate --from ./single.cose --remove-key ./base.pub -o ./x.cose");
    assert!(told.contains("the only key of the image rule for `a`"), "{told}");
}

#[test]
fn an_ecdsa_key_may_sign_images_and_nothing_else() {
    let desk = Desk::new();
    desk.keys(&["root", "ops"]);
    desk.write("ec.key", &openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]));
    desk.write("ec.pub", &openssl(&["pkey", "-in", desk.path("ec.key").to_str().unwrap(), "-pubout"]));
    desk.ok("trust init --root-key ./root.key --manifest-key ./ops.pub --image-key ./ec.pub -o ./trust.cose");
    let root = check::factory(&read(&desk.path("trust.cose")).unwrap()).unwrap();
    assert_eq!(check::role_spki(&root, RoleName::Image).len(), 1);
    let told =
        desk.refused("trust init --root-key ./root.key --manifest-key ./ec.pub --image-key ./ec.pub -o ./t.cose");
    assert!(told.contains("role Manifest has a key that is not Ed25519"), "{told}");
}

#[test]
fn the_same_manifest_in_three_notations_is_the_same() {
    let desk = Desk::new();
    desk.write("m.yaml", WEB);
    let yaml = manifest::load(&desk.path("m.yaml")).unwrap();
    for ending in ["toml", "json", "yaml"] {
        let name = format!("again.{ending}");
        desk.write(&name, &desk.ok(&format!("manifest convert ./m.yaml --to {ending}")));
        assert_eq!(manifest::load(&desk.path(&name)).unwrap(), yaml, "{ending}");
    }
    // A bare date is TOML's own.
    desk.write("bare.toml", "apiVersion = \"edge/v1\"\ndevice = \"pump-1\"\nsequence = 7\nissued = 2026-01-01T00:00:00Z\nexpires = 2126-01-01T00:00:00Z\n");
    assert_eq!(manifest::load(&desk.path("bare.toml")).unwrap().issued, yaml.issued);
}

#[test]
fn every_mistake_is_told_at_once_with_its_place() {
    let desk = Desk::new();
    let wrong = WEB
        .replace("      memory: 16Mi\n", "      memroy: 16Mi\n      memory: much\n")
        .replace("    health:\n", "    helth: {}\n    health:\n")
        .replace("      db: healthy\n", "      db: helthy\n");
    desk.write("m.yaml", &wrong);
    assert_eq!(
        desk.refused("manifest validate ./m.yaml"),
        "m.yaml: 4 problems:
  workloads.web.dependsOn.db: unknown value `helthy`; did you mean `healthy`?
  workloads.web.helth: unknown field; did you mean `health`?
  workloads.web.resources.memory: `much` is not an amount of bytes such as `64Mi`, `500k` or `1048576`
  workloads.web.resources.memroy: unknown field; did you mean `memory`?"
    );
    desk.write("m.yaml", &WEB.replace("db: healthy", "dbb: healthy").replace("cpu: 0.5", "pids: 9"));
    assert_eq!(
        desk.refused("manifest validate ./m.yaml"),
        "m.yaml: 2 problems:
  workloads.web.resources.cpu: is required: no workload without a wall
  workloads.web.dependsOn: there is no workload `dbb`; did you mean `db`?"
    );
    desk.write("m.yaml", &WEB.replace("sequence: 7\n", ""));
    assert_eq!(desk.refused("manifest validate ./m.yaml"), "m.yaml: 1 problem:\n  missing field `sequence`");
}

#[test]
fn a_key_that_is_there_twice_is_refused_in_every_notation() {
    let desk = Desk::new();
    desk.write("m.yaml", &WEB.replace("device: pump-1\n", "device: pump-1\ndevice: pump-2\n"));
    desk.write("deep.yaml", &WEB.replace("    image: registry.example:5000/web:1\n", "    image: a\n    image: b\n"));
    desk.write("m.json", r#"{"device": "pump-1", "device": "pump-2"}"#);
    desk.write("m.toml", "device = \"pump-1\"\ndevice = \"pump-2\"\n");
    for (name, words) in [
        ("m.yaml", "`device` is there twice"),
        ("deep.yaml", "workloads.web: `image` is there twice at line"),
        ("m.json", "`device` is there twice at line 1"),
        ("m.toml", "duplicate key"),
    ] {
        let told = desk.refused(&format!("manifest validate ./{name}"));
        assert!(told.contains(words), "{told}");
    }
    desk.write("list.yaml", "- a\n");
    assert!(desk.refused("manifest sign ./list.yaml --key ./k --sequence 1").contains("not a manifest"));
}

#[test]
fn what_devices_would_refuse_is_not_signed() {
    let desk = Desk::new();
    desk.keys(&["ops"]);
    let sign = "manifest sign ./m.yaml --key ./ops.key";
    desk.write("m.yaml", &WEB.replace("2126", "2026-01-02T00:00:00Z #"));
    assert!(desk.refused(sign).contains("is over"), "{}", desk.refused(sign));
    desk.write("m.yaml", &WEB.replace("issued: 2026", "issued: 2125"));
    assert!(desk.refused(sign).contains("is in the future"), "{}", desk.refused(sign));
    desk.write("m.yaml", &WEB.replace("cpu: 0.5", ""));
    assert!(desk.refused(sign).contains("resources.cpu: is required"));
    assert!(!desk.path("m.cose").exists(), "nothing was written");

    // The dates and the sequence may come with the signing.
    desk.write("m.yaml", &WEB.replace("sequence: 7\n", "").replace("issued: 2026-01-01T00:00:00Z\n", ""));
    desk.ok(&format!("{sign} --sequence 9 --expires 30days"));
    let shown = desk.ok("manifest inspect ./m.cose");
    assert!(shown.contains("sequence: 9") && shown.contains("not checked"), "{shown}");
}

#[test]
fn a_stranger_and_a_changed_file_are_seen_before_they_travel() {
    let desk = Desk::new();
    desk.keys(&["root", "ops", "stranger"]);
    desk.ok("trust init --root-key ./root.key --manifest-key ./ops.pub --image-key ./ops.pub -o ./trust.cose");
    desk.write("m.yaml", WEB);
    desk.ok("manifest sign ./m.yaml --key ./stranger.key");
    let told = desk.refused("manifest inspect ./m.cose --trust ./trust.cose");
    assert!(told.contains("is no manifest key of trust root version 1"), "{told}");
    assert!(desk.refused("push ./m.cose --to http://127.0.0.1:1").contains("only https://"));
    let told = desk.refused("push ./m.cose --to https://127.0.0.1:1 --device pump-2");
    assert_eq!(told, "m.cose: is for device pump-1, not for pump-2");
    desk.write("m.cose", "text");
    assert!(desk.run("push ./m.cose --to https://127.0.0.1:1").is_err());
}

fn shipped(name: &str) -> PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../config").join(name)
}

#[test]
fn the_shipped_schema_is_the_one_of_the_types() {
    let shipped = std::fs::read_to_string(shipped("manifest.schema.json")).unwrap();
    let now = manifest::schema().unwrap() + "\n";
    assert!(shipped == now, "config/manifest.schema.json is old: `edgectl manifest schema` prints the new one");
}

#[test]
fn the_shipped_example_is_sound_and_can_be_signed() {
    let desk = Desk::new();
    desk.keys(&["ops"]);
    std::fs::copy(shipped("manifest.yaml"), desk.path("m.yaml")).unwrap();
    desk.ok("manifest validate ./m.yaml");
    desk.ok("manifest sign ./m.yaml --key ./ops.key --expires 30days");
}

/// As shipped, `agent.toml` says the defaults; with its comment signs taken away, it says every key there is.
#[test]
fn the_shipped_configuration_names_every_key() {
    use crate::config::Config;
    let text = std::fs::read_to_string(shipped("agent.toml")).unwrap();
    assert_eq!(Config::parse(&text).unwrap(), Config::default());

    let uncommented: String = text
        .lines()
        .map(|line| line.strip_prefix('#').filter(|l| !l.starts_with(' ')).unwrap_or(line))
        .fold(String::new(), |all, line| all + line + "\n");
    Config::parse(&uncommented).unwrap_or_else(|error| panic!("{error}\n{uncommented}"));
    let told: toml::Table = toml::from_str(&uncommented).unwrap();
    let keys = |at: &str| {
        let error = Config::parse(&format!("{at}xyzzy = 1")).unwrap_err().to_string();
        let list = error.split_once("`xyzzy`, expected").unwrap_or_else(|| panic!("{at}: {error}")).1.to_owned();
        list.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
    };
    for section in keys("") {
        let (header, table) = match section.as_str() {
            "registry" => {
                let (host, table) = told["registry"].as_table().unwrap().iter().next().unwrap();
                (format!("[registry.\"{host}\"]\n"), table.as_table().unwrap())
            }
            other => (format!("[{other}]\n"), told[other].as_table().unwrap()),
        };
        for key in keys(&header) {
            assert!(table.contains_key(&key), "config/agent.toml says nothing of `{key}` in {header}");
        }
    }
}

#[test]
fn the_checked_names_of_capabilities_are_those_of_the_runtime() {
    for name in edged_model::validate::CAPABILITIES {
        assert!(crate::runtime::caps::bit(name).is_some(), "{name}");
    }
}

/// A device's own HTTPS port with what it decides, and nothing else of an agent.
fn device_port(desk: &Desk) -> String {
    use crate::report::{Offer, push};
    use crate::verify::{self, DeviceFacts, Verdict};
    use edged_model::id::Sequence;

    let root = check::factory(&read(&desk.path("trust.cose")).unwrap()).unwrap();
    let keep = desk.dir.path().to_owned();
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let config = crate::config::Api { listen: Some("127.0.0.1:0".to_owned()), ..Default::default() };
            let mut facts = DeviceFacts {
                id: "pump-1".parse().unwrap(),
                groups: Vec::new(),
                highest_sequence: Sequence(0),
                newest_digest: None,
                now: now(),
                knows_time: true,
            };
            let (pushes, mut pushed) = tokio::sync::mpsc::channel::<Offer>(1);
            let address = push::listen(&config, &facts.id, &keep, pushes).await.unwrap().unwrap();
            ready.send(address.port()).unwrap();
            while let Some(Offer { envelope, reply, .. }) = pushed.recv().await {
                let verdict = verify::manifest(&envelope, &root, &facts).map(|verdict| {
                    if let Verdict::Accepted(verified) = verdict {
                        facts.highest_sequence = verified.manifest.sequence;
                        facts.newest_digest = Some(verified.digest);
                    }
                    facts.highest_sequence
                });
                reply.send(verdict.map(crate::report::Taken::Generation)).unwrap();
            }
        });
    });
    format!("https://localhost:{}", is_ready.recv().unwrap())
}

#[test]
fn what_a_device_answers_to_a_push_is_told_in_its_own_words() {
    let desk = Desk::new();
    desk.keys(&["root", "ops", "stranger"]);
    desk.ok("trust init --root-key ./root.key --manifest-key ./ops.pub --image-key ./ops.pub -o ./trust.cose");
    let url = device_port(&desk);
    let push = format!("push ./m.cose --to {url} --ca ./push.crt");
    desk.write("m.yaml", WEB);

    desk.ok("manifest sign ./m.yaml --key ./stranger.key");
    let told = desk.refused(&push);
    assert!(
        told.contains("refused: manifest ") && told.contains("is no manifest key of trust root version 1"),
        "{told}"
    );
    assert!(told.contains("\n  sign it with a key of the trust root's `manifest` role"), "{told}");

    desk.ok("manifest sign ./m.yaml --key ./ops.key");
    let told = desk.ok(&push);
    assert!(told.starts_with(&format!("{url}/v1/manifest: generation 7 taken (")), "{told}");
    assert_eq!(desk.ok(&push), told, "the same again is no replay");

    desk.ok("manifest sign ./m.yaml --key ./ops.key --sequence 6");
    let told = desk.refused(&push);
    assert!(told.contains("manifest sequence 6 is not above 7, the highest seen"), "{told}");

    // Without the device's certificate nothing is sent.
    let told = desk.refused(&format!("push ./m.cose --to {url}"));
    assert!(!told.contains("refused:"), "{told}");
}
