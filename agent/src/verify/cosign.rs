//! Image signatures as cosign writes them with a key: the tag scheme with its simple-signing payload
//! (`sha256-<hex>.sig`), and the sigstore bundle, found by the referrers API or its tag, with a DSSE envelope or with a
//! signature of the image manifest itself. Checked are the payload's kind, the digest it names, what else the trust root's
//! rule wants named, and the signature: Ed25519 in both forms of RFC 8032 that signers use, or ECDSA P-256 (cosign's
//! default key).
//!
//! Pure: documents come in, the number of keys that signed goes out.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use edged_model::id::Digest;
use edged_model::keys::PublicKey;
use edged_model::reason::{Code, Reason};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde::Deserialize;

/// The annotation that holds a simple-signing payload's signature.
pub const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";

/// The media type of a simple-signing payload.
pub const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// Bundles of all versions begin so.
pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.";

/// Artifacts of simple-signing payloads that hang on their image by the referrers API.
const SIMPLE_SIGNING_ARTIFACT: &str = "application/vnd.dev.cosign.artifact.sig.";

/// What lists name as the type of an artifact that has none of its own (image-spec, "Guidelines for Artifact Usage"; some
/// signers' libraries write it for all).
const NO_TYPE: [&str; 3] = ["", "application/vnd.oci.empty.v1+json", "application/vnd.oci.image.config.v1+json"];

/// Whether an artifact that is listed so can be a signature of an image. `None`: the list does not say.
pub fn may_sign(artifact_type: Option<&str>, predicate_type: Option<&str>) -> Option<bool> {
    let kind = artifact_type.filter(|kind| !NO_TYPE.contains(kind));
    match (kind, predicate_type) {
        // Statements of other things are signed and hung up in the same way.
        (_, Some(predicate)) if predicate != SIGN_PREDICATE => Some(false),
        (Some(kind), _) => Some(kind.starts_with(BUNDLE) || kind.starts_with(SIMPLE_SIGNING_ARTIFACT)),
        (None, Some(_)) => Some(true),
        (None, None) => None,
    }
}

/// One thing that claims to be a signature of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    SimpleSigning { payload: Vec<u8>, signature: String },
    Bundle { json: Vec<u8> },
}

/// SPKI of an ECDSA key on P-256 (RFC 5480): everything before the uncompressed point.
const P256_SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// Whether the key in `spki` signed `bytes`. A key of an unknown kind has signed nothing.
fn verifies(spki: &[u8], bytes: &[u8], signature: &[u8]) -> bool {
    if let Ok(key) = PublicKey::from_spki(spki) {
        // cosign 3 signs images with Ed25519ph, other signers with plain Ed25519.
        return key.verifies(bytes, signature) || key.verifies_prehashed(bytes, signature);
    }
    spki.strip_prefix(&P256_SPKI_PREFIX)
        .is_some_and(|point| UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point).verify(bytes, signature).is_ok())
}

/// Whose signatures an image must have, and what they must name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// SPKI DER.
    pub keys: Vec<Vec<u8>>,
    pub threshold: usize,
    pub identity: Option<String>,
    pub annotations: BTreeMap<String, String>,
}

/// Checks that enough of the wanted keys have signed the image manifest (or index) `document`.
pub fn check(image: &str, document: &[u8], claims: &[Claim], wanted: &Wanted) -> Result<(), Reason> {
    let mut count = Count::new(document, wanted);
    claims.iter().for_each(|claim| count.add(claim));
    count.verdict(image)
}

/// The keys that have signed a document, counted claim by claim: nobody need have them all.
pub struct Count<'w> {
    document: &'w [u8],
    digest: Digest,
    wanted: &'w Wanted,
    claims: usize,
    /// By key.
    signed: Vec<bool>,
    wrong: Option<(Code, String)>,
}

impl<'w> Count<'w> {
    pub fn new(document: &'w [u8], wanted: &'w Wanted) -> Self {
        let signed = vec![false; wanted.keys.len()];
        Self { document, digest: Digest::of(document), wanted, claims: 0, signed, wrong: None }
    }

    pub fn add(&mut self, claim: &Claim) {
        self.claims += 1;
        match signers(claim, self.document, self.digest, self.wanted) {
            Ok(by) => by.into_iter().for_each(|index| self.signed[index] = true),
            Err(why) => self.wrong = Some(why),
        }
    }

    fn keys(&self) -> usize {
        self.signed.iter().filter(|signed| **signed).count()
    }

    /// Nothing that is added can change the verdict.
    pub fn is_enough(&self) -> bool {
        self.keys() >= self.wanted.threshold.max(1)
    }

    pub fn verdict(self, image: &str) -> Result<(), Reason> {
        if self.is_enough() {
            return Ok(());
        }
        let digest = self.digest.short();
        if self.claims == 0 {
            return Err(Reason::new(Code::ImageUnsigned, format!("image {image} ({digest}) is not signed"))
                .next("sign it with `cosign sign --key …`"));
        }
        let (count, threshold) = (self.keys(), self.wanted.threshold);
        if count > 0 {
            let text = format!("image {image}: signed by {count} of the {threshold} keys that are needed");
            return Err(
                Reason::new(Code::ThresholdNotMet, text).next("let more of the trust root's image keys sign it")
            );
        }
        let (code, why) =
            self.wrong.unwrap_or((Code::ImageWrongKey, "no signature is by an image key of the trust root".to_owned()));
        let next = match code {
            Code::ImageWrongIdentity => "sign it as the trust root's rule for this image wants it",
            _ => "sign it with a key of the trust root's `image` role, or of its rule for this image",
        };
        Err(Reason::new(code, format!("image {image} ({digest}): {why}")).next(next))
    }
}

/// What a claim says once its signature is believed.
#[derive(Default)]
struct Stated {
    digest: Option<Digest>,
    identity: Option<String>,
    annotations: BTreeMap<String, String>,
}

/// What was signed, its signatures, and what it states.
type Read = (Vec<u8>, Vec<Vec<u8>>, Stated);

/// Which of the wanted keys made this signature over this document.
fn signers(claim: &Claim, document: &[u8], digest: Digest, wanted: &Wanted) -> Result<Vec<usize>, (Code, String)> {
    let malformed = |what: &str| (Code::Malformed, format!("its signature has no {what}"));
    let (signed_bytes, signatures, stated) = match claim {
        Claim::SimpleSigning { payload, signature } => {
            let signature = STANDARD.decode(signature).map_err(|_| malformed("readable base64"))?;
            let stated = simple_signing(payload).ok_or_else(|| malformed("simple-signing payload"))?;
            (payload.clone(), vec![signature], stated)
        }
        Claim::Bundle { json } => bundle(json, document, digest).map_err(malformed)?,
    };
    let by_key = |spki: &Vec<u8>| signatures.iter().any(|signature| verifies(spki, &signed_bytes, signature));
    let by: Vec<_> = wanted.keys.iter().enumerate().filter(|(_, spki)| by_key(spki)).map(|(index, _)| index).collect();
    if by.is_empty() {
        return Ok(by);
    }
    match stated.digest {
        Some(named) if named == digest => {}
        Some(named) => return Err((Code::DigestMismatch, format!("the signature is for {}", named.short()))),
        None => return Err(malformed("digest")),
    }
    if let Some(identity) = wanted.identity.as_ref().filter(|identity| stated.identity.as_ref() != Some(identity)) {
        let named = match stated.identity.as_deref() {
            None | Some("") => "no name".to_owned(),
            Some(named) => format!("`{}`", printable(named)),
        };
        return Err((Code::ImageWrongIdentity, format!("the signature is for {named}, and must be for `{identity}`")));
    }
    if let Some((key, value)) =
        wanted.annotations.iter().find(|(key, value)| stated.annotations.get(*key) != Some(value))
    {
        return Err((Code::ImageWrongIdentity, format!("the signature does not say `{key}={value}`")));
    }
    Ok(by)
}

/// A sentence is shown on terminals.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(120).collect()
}

/// Signatures of one envelope that are tried with each key. cosign writes one; a hostile registry would have a device try
/// thousands.
const SIGNATURES_MAX: usize = 16;

/// A sigstore bundle (protobuf-specs, sigstore_bundle.proto) of either content.
fn bundle(json: &[u8], document: &[u8], digest: Digest) -> Result<Read, &'static str> {
    let bundle: Bundle = serde_json::from_slice(json).map_err(|_| "readable sigstore bundle")?;
    match (bundle.dsse_envelope, bundle.message_signature) {
        (Some(envelope), None) => {
            let payload = STANDARD.decode(&envelope.payload).map_err(|_| "readable base64")?;
            let stated =
                statement(&envelope.payload_type, &payload, digest).ok_or("statement that the image was signed")?;
            let signatures = envelope.signatures.iter().take(SIGNATURES_MAX);
            let signatures = signatures.filter_map(|s| STANDARD.decode(&s.sig).ok()).collect();
            Ok((pre_authentication(&envelope.payload_type, &payload), signatures, stated))
        }
        // The document itself is what was signed: it can be no other one. It names nothing else.
        (None, Some(message)) => {
            let signature = STANDARD.decode(&message.signature).map_err(|_| "readable base64")?;
            Ok((document.to_vec(), vec![signature], Stated { digest: Some(digest), ..Stated::default() }))
        }
        _ => Err("content that is one thing"),
    }
}

#[derive(Deserialize)]
struct SimpleSigning {
    critical: Critical,
    #[serde(default)]
    optional: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Default, Deserialize)]
struct CriticalIdentity {
    #[serde(rename = "docker-reference", default)]
    reference: String,
}

#[derive(Deserialize)]
struct Critical {
    #[serde(default)]
    identity: CriticalIdentity,
    image: CriticalImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct CriticalImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

fn simple_signing(payload: &[u8]) -> Option<Stated> {
    let payload: SimpleSigning = serde_json::from_slice(payload).ok()?;
    let critical = payload.critical;
    if !matches!(critical.kind.as_str(), "cosign container image signature" | "atomic container signature") {
        return None;
    }
    let text = |(key, value): (String, serde_json::Value)| Some((key, value.as_str()?.to_owned()));
    Some(Stated {
        digest: Some(Digest::parse(&critical.image.digest).ok()?),
        identity: Some(critical.identity.reference),
        annotations: payload.optional.unwrap_or_default().into_iter().filter_map(text).collect(),
    })
}

#[derive(Deserialize)]
struct Bundle {
    #[serde(rename = "dsseEnvelope")]
    dsse_envelope: Option<Dsse>,
    #[serde(rename = "messageSignature")]
    message_signature: Option<MessageSignature>,
}

#[derive(Deserialize)]
struct MessageSignature {
    signature: String,
}

#[derive(Deserialize)]
struct Dsse {
    payload: String,
    #[serde(rename = "payloadType")]
    payload_type: String,
    signatures: Vec<DsseSignature>,
}

#[derive(Deserialize)]
struct DsseSignature {
    sig: String,
}

/// What a signer of images states. A bill of materials or a test result signed with the same key is another statement.
const SIGN_PREDICATE: &str = "https://sigstore.dev/cosign/sign/v1";

#[derive(Deserialize)]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    subject: Vec<Subject>,
}

#[derive(Deserialize)]
struct Subject {
    #[serde(default)]
    name: Option<String>,
    digest: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, serde_json::Value>,
}

/// What an in-toto statement says of the wanted digest; if that is not among its subjects, of the first.
fn statement(payload_type: &str, payload: &[u8], wanted: Digest) -> Option<Stated> {
    if payload_type != "application/vnd.in-toto+json" {
        return None;
    }
    let statement: Statement = serde_json::from_slice(payload).ok()?;
    if statement.kind != "https://in-toto.io/Statement/v1" || statement.predicate_type != SIGN_PREDICATE {
        return None;
    }
    let text = |(key, value): (String, serde_json::Value)| Some((key, value.as_str()?.to_owned()));
    let stated = |subject: Subject| {
        let digest = Digest::parse(&format!("sha256:{}", subject.digest.get("sha256")?)).ok()?;
        let annotations = subject.annotations.into_iter().filter_map(text).collect();
        Some(Stated { digest: Some(digest), identity: subject.name, annotations })
    };
    let mut subjects: Vec<Stated> = statement.subject.into_iter().filter_map(stated).collect();
    let at = subjects.iter().position(|subject| subject.digest == Some(wanted)).unwrap_or(0);
    (at < subjects.len()).then(|| subjects.swap_remove(at))
}

/// DSSE's PAE: what is really signed (secure-systems-lab/dsse, protocol.md).
fn pre_authentication(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::keys::SecretKey;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed(&[n; 32])
    }

    fn spki(n: u8) -> Vec<u8> {
        key(n).public().to_spki().unwrap()
    }

    fn simple(digest: Digest, by: u8) -> Claim {
        let payload = format!(
            r#"{{"critical":{{"identity":{{"docker-reference":""}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"cosign container image signature"}},"optional":null}}"#
        );
        let signature = STANDARD.encode(key(by).sign(payload.as_bytes()));
        Claim::SimpleSigning { payload: payload.into_bytes(), signature }
    }

    fn bundle(digest: Digest, by: u8) -> Claim {
        stated(digest, by, SIGN_PREDICATE)
    }

    fn stated(digest: Digest, by: u8, predicate: &str) -> Claim {
        stated_of(&[(digest, None)], by, predicate)
    }

    /// With subjects of these names.
    fn stated_of(subjects: &[(Digest, Option<&str>)], by: u8, predicate: &str) -> Claim {
        let subject = |(digest, name): &(Digest, Option<&str>)| {
            let name = name.map(|name| format!(r#""name":"{name}","#)).unwrap_or_default();
            format!(r#"{{{name}"digest":{{"sha256":"{}"}}}}"#, digest.hex())
        };
        let subjects: Vec<String> = subjects.iter().map(subject).collect();
        let statement = format!(
            r#"{{"_type":"https://in-toto.io/Statement/v1","subject":[{}],"predicateType":"{predicate}"}}"#,
            subjects.join(",")
        );
        let kind = "application/vnd.in-toto+json";
        let sig = STANDARD.encode(key(by).sign(&pre_authentication(kind, statement.as_bytes())));
        let payload = STANDARD.encode(statement);
        let json = format!(
            r#"{{"dsseEnvelope":{{"payload":"{payload}","payloadType":"{kind}","signatures":[{{"sig":"{sig}"}}]}}}}"#
        );
        Claim::Bundle { json: json.into_bytes() }
    }

    fn wanted(keys: &[u8], threshold: usize) -> Wanted {
        Wanted { keys: keys.iter().map(|n| spki(*n)).collect(), threshold, ..Wanted::default() }
    }

    fn code(claims: &[Claim], wanted: &Wanted) -> Code {
        check("r/i", b"image", claims, wanted).unwrap_err().code
    }

    /// `cosign sign-blob` of the image manifest.
    fn of_message(document: &[u8], by: u8) -> Claim {
        let signature = STANDARD.encode(key(by).sign(document));
        let json = format!(
            r#"{{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","messageSignature":{{"messageDigest":{{}},"signature":"{signature}"}}}}"#
        );
        Claim::Bundle { json: json.into_bytes() }
    }

    #[test]
    fn every_format_is_believed_from_the_right_key_only() {
        let digest = Digest::of(b"image");
        for claim in [simple(digest, 1), bundle(digest, 1), of_message(b"image", 1)] {
            let claims = std::slice::from_ref(&claim);
            assert_eq!(check("r/i", b"image", claims, &wanted(&[1], 1)), Ok(()));
            assert_eq!(code(claims, &wanted(&[2], 1)), Code::ImageWrongKey);
            assert_eq!(code(claims, &wanted(&[1, 2], 2)), Code::ThresholdNotMet);
        }
        assert_eq!(code(&[], &wanted(&[1], 1)), Code::ImageUnsigned);
    }

    #[test]
    fn a_signature_of_another_image_is_none_of_this_one() {
        let other = Digest::of(b"other");
        for claim in [simple(other, 1), bundle(other, 1)] {
            assert_eq!(code(&[claim], &wanted(&[1], 1)), Code::DigestMismatch);
        }
        assert_eq!(code(&[of_message(b"other", 1)], &wanted(&[1], 1)), Code::ImageWrongKey, "other bytes");
    }

    #[test]
    fn a_bundle_with_two_contents_or_none_is_none() {
        for json in [
            "{}",
            r#"{"messageSignature":{"signature":"AA=="},"dsseEnvelope":{"payload":"","payloadType":"","signatures":[]}}"#,
            r#"{"messageSignature":{"signature":"no base64"}}"#,
        ] {
            assert_eq!(code(&[Claim::Bundle { json: json.into() }], &wanted(&[1], 1)), Code::Malformed, "{json}");
        }
    }

    #[test]
    fn what_a_rule_wants_named_must_be_signed_along() {
        let digest = Digest::of(b"image");
        let named = Wanted { identity: Some("r.example/i".to_owned()), ..wanted(&[1], 1) };
        let said = Wanted { annotations: [("team".to_owned(), "pumps".to_owned())].into(), ..wanted(&[1], 1) };
        for claim in [simple(digest, 1), bundle(digest, 1), of_message(b"image", 1)] {
            assert_eq!(code(std::slice::from_ref(&claim), &named), Code::ImageWrongIdentity);
            assert_eq!(code(&[claim], &said), Code::ImageWrongIdentity);
        }
        let payload = format!(
            r#"{{"critical":{{"identity":{{"docker-reference":"r.example/i"}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"cosign container image signature"}},"optional":{{"team":"pumps"}}}}"#
        );
        let signature = STANDARD.encode(key(1).sign(payload.as_bytes()));
        let claims = [Claim::SimpleSigning { payload: payload.into_bytes(), signature }];
        assert_eq!(check("r/i", b"image", &claims, &named), Ok(()));
        assert_eq!(check("r/i", b"image", &claims, &said), Ok(()));
        let other = Wanted { identity: Some("r.example/other".to_owned()), ..named };
        let why = check("r/i", b"image", &claims, &other).unwrap_err();
        assert!(why.text.contains("for `r.example/i`, and must be for `r.example/other`"), "{why}");
    }

    #[test]
    fn a_statement_names_the_image_by_the_name_of_its_own_subject() {
        let (digest, other) = (Digest::of(b"image"), Digest::of(b"other"));
        let named = Wanted { identity: Some("r.example/i".to_owned()), ..wanted(&[1], 1) };
        let judged = |subjects: &[(Digest, Option<&str>)]| {
            let claim = stated_of(subjects, 1, SIGN_PREDICATE);
            check("r/i", b"image", &[claim], &named)
        };
        assert_eq!(judged(&[(digest, Some("r.example/i"))]), Ok(()));
        assert_eq!(judged(&[(other, Some("r.example/x")), (digest, Some("r.example/i"))]), Ok(()));
        let refused = |subjects: &[(Digest, Option<&str>)], named: &str| {
            let why = judged(subjects).unwrap_err();
            let text = format!("the signature is for {named}, and must be for `r.example/i`");
            assert!(why.code == Code::ImageWrongIdentity && why.text.ends_with(&text), "{why}");
        };
        refused(&[(digest, None)], "no name");
        refused(&[(digest, Some(""))], "no name");
        refused(&[(digest, Some("r.example/other"))], "`r.example/other`");
        refused(&[(digest, Some("r.example/i/more"))], "`r.example/i/more`");
        // The name that is wanted, of another image in the same statement.
        refused(&[(other, Some("r.example/i")), (digest, Some("r.example/x"))], "`r.example/x`");
        refused(&[(digest, None), (other, Some("r.example/i"))], "no name");
        let elsewhere = judged(&[(other, Some("r.example/i"))]).unwrap_err();
        assert_eq!(elsewhere.code, Code::DigestMismatch, "{elsewhere}");
        // Named by somebody else.
        let claim = stated_of(&[(digest, Some("r.example/i"))], 2, SIGN_PREDICATE);
        assert_eq!(code(&[claim], &named), Code::ImageWrongKey);
    }

    #[test]
    fn an_attestation_is_no_signature_of_the_image() {
        let claim = stated(Digest::of(b"image"), 1, "https://slsa.dev/provenance/v1");
        assert_eq!(code(&[claim], &wanted(&[1], 1)), Code::Malformed);
    }

    #[test]
    fn one_key_counts_once() {
        let digest = Digest::of(b"image");
        let claims = [simple(digest, 1), bundle(digest, 1), of_message(b"image", 1)];
        assert_eq!(code(&claims, &wanted(&[1, 2], 2)), Code::ThresholdNotMet);
    }
}
