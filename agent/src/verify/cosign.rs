//! Image signatures as cosign writes them with a key: the tag scheme with its simple-signing payload
//! (`sha256-<hex>.sig`), and the sigstore bundle with a DSSE envelope, found by the referrers API or its tag. Checked
//! are the payload's kind, the digest it names, and the signature: Ed25519 in both forms of RFC 8032 that signers use, or
//! ECDSA P-256 (cosign's default key).
//!
//! Pure: documents come in, the number of keys that signed goes out.

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

/// Checks that `threshold` of `keys` (SPKI DER) have signed `digest`.
pub fn check(image: &str, digest: Digest, claims: &[Claim], keys: &[Vec<u8>], threshold: usize) -> Result<(), Reason> {
    if claims.is_empty() {
        return Err(Reason::new(Code::ImageUnsigned, format!("image {image} ({}) is not signed", digest.short()))
            .next("sign it with `cosign sign --key …`"));
    }
    let mut wrong = None;
    let mut signed = vec![false; keys.len()];
    for claim in claims {
        match signers(claim, digest, keys) {
            Ok(by) => by.into_iter().for_each(|index| signed[index] = true),
            Err(why) => wrong = Some(why),
        }
    }
    let count = signed.iter().filter(|signed| **signed).count();
    if count >= threshold.max(1) {
        return Ok(());
    }
    if count > 0 {
        let text = format!("image {image}: signed by {count} of the {threshold} keys that are needed");
        return Err(Reason::new(Code::ThresholdNotMet, text));
    }
    let (code, why) =
        wrong.unwrap_or((Code::ImageWrongKey, "no signature is by an image key of the trust root".to_owned()));
    Err(Reason::new(code, format!("image {image} ({}): {why}", digest.short()))
        .next("sign it with a key of the trust root's `image` role"))
}

/// Which of `keys` made this signature over this digest.
fn signers(claim: &Claim, digest: Digest, keys: &[Vec<u8>]) -> Result<Vec<usize>, (Code, String)> {
    let malformed = |what: &str| (Code::Malformed, format!("its signature has no {what}"));
    let (signed_bytes, signatures, named) = match claim {
        Claim::SimpleSigning { payload, signature } => {
            let signature = STANDARD.decode(signature).map_err(|_| malformed("readable base64"))?;
            let named = simple_signing_digest(payload).ok_or_else(|| malformed("simple-signing payload"))?;
            (payload.clone(), vec![signature], named)
        }
        Claim::Bundle { json } => {
            let bundle: Bundle = serde_json::from_slice(json).map_err(|_| malformed("sigstore bundle with DSSE"))?;
            let envelope = bundle.dsse_envelope;
            let payload = STANDARD.decode(&envelope.payload).map_err(|_| malformed("readable base64"))?;
            let named = statement_digest(&envelope.payload_type, &payload, digest)
                .ok_or_else(|| malformed("statement that the image was signed"))?;
            let signatures = envelope.signatures.iter().filter_map(|s| STANDARD.decode(&s.sig).ok()).collect();
            (pre_authentication(&envelope.payload_type, &payload), signatures, named)
        }
    };
    let by_key = |spki: &Vec<u8>| signatures.iter().any(|signature| verifies(spki, &signed_bytes, signature));
    let by: Vec<_> = keys.iter().enumerate().filter(|(_, spki)| by_key(spki)).map(|(index, _)| index).collect();
    if !by.is_empty() && named != digest {
        return Err((Code::DigestMismatch, format!("the signature is for {}", named.short())));
    }
    Ok(by)
}

#[derive(Deserialize)]
struct SimpleSigning {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: CriticalImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct CriticalImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

fn simple_signing_digest(payload: &[u8]) -> Option<Digest> {
    let payload: SimpleSigning = serde_json::from_slice(payload).ok()?;
    let is_cosign =
        matches!(payload.critical.kind.as_str(), "cosign container image signature" | "atomic container signature");
    if is_cosign { Digest::parse(&payload.critical.image.digest).ok() } else { None }
}

#[derive(Deserialize)]
struct Bundle {
    #[serde(rename = "dsseEnvelope")]
    dsse_envelope: Dsse,
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
    digest: std::collections::BTreeMap<String, String>,
}

/// The digest that an in-toto statement is about: the wanted one if it is among its subjects, else the first.
fn statement_digest(payload_type: &str, payload: &[u8], wanted: Digest) -> Option<Digest> {
    if payload_type != "application/vnd.in-toto+json" {
        return None;
    }
    let statement: Statement = serde_json::from_slice(payload).ok()?;
    if statement.kind != "https://in-toto.io/Statement/v1" || statement.predicate_type != SIGN_PREDICATE {
        return None;
    }
    let hex = statement.subject.iter().filter_map(|subject| subject.digest.get("sha256"));
    let digests: Vec<_> = hex.filter_map(|hex| Digest::parse(&format!("sha256:{hex}")).ok()).collect();
    if digests.contains(&wanted) { Some(wanted) } else { digests.first().copied() }
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
        let statement = format!(
            r#"{{"_type":"https://in-toto.io/Statement/v1","subject":[{{"digest":{{"sha256":"{}"}}}}],"predicateType":"{predicate}"}}"#,
            digest.hex()
        );
        let kind = "application/vnd.in-toto+json";
        let sig = STANDARD.encode(key(by).sign(&pre_authentication(kind, statement.as_bytes())));
        let payload = STANDARD.encode(statement);
        let json = format!(
            r#"{{"dsseEnvelope":{{"payload":"{payload}","payloadType":"{kind}","signatures":[{{"sig":"{sig}"}}]}}}}"#
        );
        Claim::Bundle { json: json.into_bytes() }
    }

    #[test]
    fn both_formats_are_believed_from_the_right_key_only() {
        let digest = Digest::of(b"image");
        for claim in [simple(digest, 1), bundle(digest, 1)] {
            let check =
                |keys: &[Vec<u8>], threshold| check("r/i", digest, std::slice::from_ref(&claim), keys, threshold);
            assert_eq!(check(&[spki(1)], 1), Ok(()));
            assert_eq!(check(&[spki(2)], 1).unwrap_err().code, Code::ImageWrongKey);
            assert_eq!(check(&[spki(1), spki(2)], 2).unwrap_err().code, Code::ThresholdNotMet);
        }
        assert_eq!(check("r/i", digest, &[], &[spki(1)], 1).unwrap_err().code, Code::ImageUnsigned);
    }

    #[test]
    fn a_signature_of_another_image_is_none_of_this_one() {
        let (this, other) = (Digest::of(b"this"), Digest::of(b"other"));
        for claim in [simple(other, 1), bundle(other, 1)] {
            assert_eq!(check("r/i", this, &[claim], &[spki(1)], 1).unwrap_err().code, Code::DigestMismatch);
        }
    }

    #[test]
    fn an_attestation_is_no_signature_of_the_image() {
        let digest = Digest::of(b"image");
        let claim = stated(digest, 1, "https://slsa.dev/provenance/v1");
        assert_eq!(check("r/i", digest, &[claim], &[spki(1)], 1).unwrap_err().code, Code::Malformed);
    }

    #[test]
    fn one_key_counts_once() {
        let digest = Digest::of(b"image");
        let claims = [simple(digest, 1), bundle(digest, 1)];
        assert_eq!(check("r/i", digest, &claims, &[spki(1), spki(2)], 2).unwrap_err().code, Code::ThresholdNotMet);
    }
}
