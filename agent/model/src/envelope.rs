//! Signed documents: `COSE_Sign` for what several people may sign, `COSE_Sign1` for a device's report (RFC 9052), with
//! EdDSA (RFC 9053, alg -8). The kind of document is in the protected header, so that one can never be taken for
//! another; the signer is named by key id.

use coset::{
    CborSerializable, ContentType, CoseSign, CoseSign1, CoseSign1Builder, CoseSignBuilder, CoseSignature,
    CoseSignatureBuilder, Header, HeaderBuilder, ProtectedHeader, RegisteredLabelWithPrivate, iana,
};

use crate::cbor::{self, CborError, Keys};
use crate::id::Digest;
use crate::keys::{KeyError, PublicKey, SecretKey};
use crate::reason::{Code, Reason};
use crate::trust::KeyId;

/// Each one costs a verification, before anybody is believed.
pub const MAX_SIGNATURES: usize = 32;

/// What is in an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Manifest,
    TrustRoot,
    Report,
}

impl Kind {
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Manifest => "application/vnd.edged.manifest+cbor",
            Self::TrustRoot => "application/vnd.edged.trust-root+cbor",
            Self::Report => "application/vnd.edged.report+cbor",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error(transparent)]
    Cbor(#[from] CborError),
    #[error("not a signed document (COSE): {why}")]
    NotCose { why: String },
    #[error("it is text, not a signed document")]
    Text,
    #[error("the content type is `{found}`, not `{}`", .wanted.content_type())]
    WrongKind { wanted: Kind, found: String },
    #[error("a critical header that this version does not know")]
    Critical,
    #[error("a header that nobody signed (only protected headers are allowed)")]
    UnprotectedHeader,
    #[error("{found} signatures; {MAX_SIGNATURES} are allowed")]
    TooManySignatures { found: usize },
    #[error("they are copies of two different documents")]
    OtherDocument,
    #[error("nobody has signed it")]
    Unsigned,
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl EnvelopeError {
    pub fn reason(&self, what: &str) -> Reason {
        let (code, next) = match self {
            Self::Cbor(error) => return error.reason(what),
            Self::Text => (Code::NotSigned, "sign it: `edgectl manifest sign FILE --key KEY -o SIGNED`"),
            Self::NotCose { .. } | Self::Unsigned => (Code::NotSigned, "send what a `sign` verb of `edgectl` wrote"),
            Self::WrongKind { .. } => (Code::Malformed, "send the right file: this one is a document of another kind"),
            Self::Critical | Self::UnprotectedHeader => (Code::Malformed, "sign it with `edgectl`"),
            Self::TooManySignatures { .. } => (Code::TooLarge, "sign it with fewer keys"),
            Self::Key(_) | Self::OtherDocument => (Code::Malformed, ""),
        };
        Reason::new(code, format!("{what}: {self}")).next(next)
    }
}

fn header(kind: Kind) -> Header {
    HeaderBuilder::new().content_type(kind.content_type().to_owned()).build()
}

fn signer_header(key: &KeyId) -> Header {
    HeaderBuilder::new().algorithm(iana::Algorithm::EdDSA).key_id(key.bytes().to_vec()).build()
}

/// Packs `payload` and signs it with each of `keys`.
pub fn sign(kind: Kind, payload: Vec<u8>, keys: &[SecretKey]) -> Result<Vec<u8>, EnvelopeError> {
    let mut builder = CoseSignBuilder::new().protected(header(kind)).payload(payload);
    for key in keys {
        let signature = CoseSignatureBuilder::new().protected(signer_header(&key.public().id()?)).build();
        builder = builder.add_created_signature(signature, b"", |bytes| key.sign(bytes));
    }
    builder.build().to_vec().map_err(not_cose)
}

/// Adds one more signature to an envelope: signers may be different people.
pub fn add_signature(bytes: &[u8], kind: Kind, key: &SecretKey) -> Result<Vec<u8>, EnvelopeError> {
    let Unverified { mut sign, .. } = open_draft(bytes, kind)?;
    let mut signature: CoseSignature =
        CoseSignatureBuilder::new().protected(signer_header(&key.public().id()?)).build();
    signature.signature = key.sign(&sign.tbs_data(b"", &signature));
    sign.signatures.retain(|other| other.protected.header.key_id != signature.protected.header.key_id);
    sign.signatures.push(signature);
    sign.to_vec().map_err(not_cose)
}

/// The signatures of two copies of one document together; of a key that signed both, the first's.
pub fn combine(first: &[u8], second: &[u8], kind: Kind) -> Result<Vec<u8>, EnvelopeError> {
    let Unverified { mut sign, .. } = open_draft(first, kind)?;
    let Unverified { sign: other, .. } = open_draft(second, kind)?;
    if sign.payload != other.payload || sign.protected.header != other.protected.header {
        return Err(EnvelopeError::OtherDocument);
    }
    for signature in other.signatures {
        let by = &signature.protected.header.key_id;
        if !sign.signatures.iter().any(|known| known.protected.header.key_id == *by) {
            sign.signatures.push(signature);
        }
    }
    sign.to_vec().map_err(not_cose)
}

fn not_cose(error: coset::CoseError) -> EnvelopeError {
    EnvelopeError::NotCose { why: error.to_string() }
}

/// An envelope that was read and not believed yet. Its content is out of reach until [`Unverified::signed_by`] says who
/// stands behind it.
#[derive(Debug)]
pub struct Unverified {
    sign: CoseSign,
    /// The digest of the envelope's bytes: its name.
    pub digest: Digest,
}

/// The content of an envelope and those of the asked keys that really signed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub payload: Vec<u8>,
    pub signers: Vec<KeyId>,
}

/// Reads an envelope strictly.
pub fn open(bytes: &[u8], kind: Kind) -> Result<Unverified, EnvelopeError> {
    let opened = open_draft(bytes, kind)?;
    if opened.sign.signatures.is_empty() {
        return Err(EnvelopeError::Unsigned);
    }
    Ok(opened)
}

/// The same for a document that waits for its signers: it may have none yet.
pub fn open_draft(bytes: &[u8], kind: Kind) -> Result<Unverified, EnvelopeError> {
    cbor::check(bytes, Keys::TextOrInteger)
        .map_err(|error| if is_text(bytes) { EnvelopeError::Text } else { error.into() })?;
    let sign = CoseSign::from_slice(bytes).map_err(not_cose)?;
    if sign.signatures.len() > MAX_SIGNATURES {
        return Err(EnvelopeError::TooManySignatures { found: sign.signatures.len() });
    }
    check_kind(&sign.protected.header, kind)?;
    check_headers(&sign.protected, &sign.unprotected)?;
    for signature in &sign.signatures {
        check_headers(&signature.protected, &signature.unprotected)?;
    }
    Ok(Unverified { sign, digest: Digest::of(bytes) })
}

/// The manifest as it was written: the usual slip, and worth better words than those of a CBOR decoder.
fn is_text(bytes: &[u8]) -> bool {
    const ENOUGH: usize = 256;
    let is_printed = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t' | 0x80..);
    !bytes.is_empty() && bytes.iter().take(ENOUGH).all(is_printed) && bytes.contains(&b'\n')
}

/// What is signed is read as strictly as the envelope itself, and what is not signed must not be there: else one
/// document could go round under many digests. A critical header (RFC 9052, 3.1) is one we would have to know.
fn check_headers(protected: &ProtectedHeader, unprotected: &Header) -> Result<(), EnvelopeError> {
    if let Some(bytes) = protected.original_data.as_deref().filter(|bytes| !bytes.is_empty()) {
        cbor::check(bytes, Keys::TextOrInteger)?;
    }
    if !protected.header.crit.is_empty() {
        return Err(EnvelopeError::Critical);
    }
    if *unprotected != Header::default() {
        return Err(EnvelopeError::UnprotectedHeader);
    }
    Ok(())
}

fn check_kind(header: &Header, wanted: Kind) -> Result<(), EnvelopeError> {
    match &header.content_type {
        Some(ContentType::Text(text)) if text == wanted.content_type() => Ok(()),
        Some(ContentType::Text(text)) => Err(EnvelopeError::WrongKind { wanted, found: cbor::printable(text) }),
        Some(ContentType::Assigned(number)) => Err(EnvelopeError::WrongKind { wanted, found: format!("{number:?}") }),
        None => Err(EnvelopeError::WrongKind { wanted, found: "none".to_owned() }),
    }
}

impl Unverified {
    /// Who claims to have signed: for messages only.
    pub fn claimed_signers(&self) -> Vec<KeyId> {
        self.sign.signatures.iter().filter_map(|s| key_id(&s.protected.header)).collect()
    }

    /// The content and which of `keys` signed it, each counted once.
    pub fn signed_by<'k>(&self, keys: impl IntoIterator<Item = &'k PublicKey>) -> Result<Signed, EnvelopeError> {
        let mut signers = Vec::new();
        for key in keys {
            let id = key.id()?;
            let is_by_key = |signature: &CoseSignature| {
                key_id(&signature.protected.header) == Some(id)
                    && is_eddsa(&signature.protected.header)
                    && key.verifies(&self.sign.tbs_data(b"", signature), &signature.signature)
            };
            if !signers.contains(&id) && self.sign.signatures.iter().any(is_by_key) {
                signers.push(id);
            }
        }
        let payload = self.sign.payload.clone().ok_or(EnvelopeError::NotCose { why: "no payload".to_owned() })?;
        Ok(Signed { payload, signers })
    }
}

fn key_id(header: &Header) -> Option<KeyId> {
    header.key_id.as_slice().try_into().ok().map(Digest::from_bytes)
}

fn is_eddsa(header: &Header) -> bool {
    header.alg == Some(RegisteredLabelWithPrivate::Assigned(iana::Algorithm::EdDSA))
}

/// A document with one signer: a device's report.
pub fn sign1(kind: Kind, payload: Vec<u8>, key: &SecretKey) -> Result<Vec<u8>, EnvelopeError> {
    let mut protected = header(kind);
    protected.alg = Some(RegisteredLabelWithPrivate::Assigned(iana::Algorithm::EdDSA));
    let built = CoseSign1Builder::new().protected(protected).payload(payload).create_signature(b"", |b| key.sign(b));
    built.build().to_vec().map_err(not_cose)
}

/// The content of a document that `key` signed.
pub fn verify1(bytes: &[u8], kind: Kind, key: &PublicKey) -> Result<Vec<u8>, EnvelopeError> {
    cbor::check(bytes, Keys::TextOrInteger)?;
    let sign1 = CoseSign1::from_slice(bytes).map_err(not_cose)?;
    check_kind(&sign1.protected.header, kind)?;
    check_headers(&sign1.protected, &sign1.unprotected)?;
    if !is_eddsa(&sign1.protected.header) {
        return Err(EnvelopeError::NotCose { why: "not signed with EdDSA".to_owned() });
    }
    if !key.verifies(&sign1.tbs_data(b""), &sign1.signature) {
        return Err(EnvelopeError::Unsigned);
    }
    sign1.payload.ok_or(EnvelopeError::NotCose { why: "no payload".to_owned() })
}

/// The content of a one-signer document, unverified: for what was verified when it was stored.
pub fn payload1(bytes: &[u8]) -> Option<Vec<u8>> {
    cbor::check(bytes, Keys::TextOrInteger).ok()?;
    CoseSign1::from_slice(bytes).ok()?.payload
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed(&[n; 32])
    }

    #[test]
    fn only_who_signed_counts_and_only_once() {
        let bytes = sign(Kind::Manifest, vec![0xa0], &[key(1), key(2)]).unwrap();
        let asked = [key(1).public(), key(1).public(), key(3).public()];
        let signed = open(&bytes, Kind::Manifest).unwrap().signed_by(&asked).unwrap();
        assert_eq!(signed.signers, [key(1).public().id().unwrap()]);
        let more = add_signature(&bytes, Kind::Manifest, &key(3)).unwrap();
        assert_eq!(open(&more, Kind::Manifest).unwrap().signed_by(&asked).unwrap().signers.len(), 2);
    }

    #[test]
    fn a_crowd_of_signatures_is_not_verified() {
        let crowd: Vec<SecretKey> = (0..=32).map(key).collect();
        let bytes = sign(Kind::Manifest, vec![0xa0], &crowd).unwrap();
        assert_eq!(open(&bytes, Kind::Manifest).unwrap_err(), EnvelopeError::TooManySignatures { found: 33 });
    }

    #[test]
    fn one_kind_is_never_another() {
        let bytes = sign(Kind::TrustRoot, vec![0xa0], &[key(1)]).unwrap();
        assert!(matches!(open(&bytes, Kind::Manifest), Err(EnvelopeError::WrongKind { .. })));
        let report = sign1(Kind::Report, vec![0xa0], &key(1)).unwrap();
        assert!(verify1(&report, Kind::Report, &key(1).public()).is_ok());
        assert!(verify1(&report, Kind::Report, &key(2).public()).is_err());
        assert!(verify1(&report, Kind::Manifest, &key(1).public()).is_err());
        assert!(open(&report, Kind::Report).is_err(), "one signer is another structure");
    }

    /// One signature with these headers, and the key's signature over them: what another program could send.
    fn foreign(protected: Header, unprotected: Header, signer: Header) -> Vec<u8> {
        let signature = CoseSignatureBuilder::new().protected(signer).build();
        CoseSignBuilder::new()
            .protected(protected)
            .unprotected(unprotected)
            .payload(vec![0xa0])
            .add_created_signature(signature, b"", |bytes| key(1).sign(bytes))
            .build()
            .to_vec()
            .unwrap()
    }

    #[test]
    fn only_headers_that_are_signed_and_known_are_read() {
        let signer = || signer_header(&key(1).public().id().unwrap());
        let none = Header::default;
        let ours = || header(Kind::Manifest);
        assert!(open(&foreign(ours(), none(), signer()), Kind::Manifest).is_ok());

        let critical = HeaderBuilder::new()
            .content_type(Kind::Manifest.content_type().to_owned())
            .add_critical(iana::HeaderParameter::Kid)
            .build();
        let refused = open(&foreign(critical, none(), signer()), Kind::Manifest).unwrap_err();
        assert_eq!(refused, EnvelopeError::Critical);

        // The kind where nobody signed it counts for nothing, and is refused even beside a signed one.
        let refused = open(&foreign(none(), ours(), signer()), Kind::Manifest).unwrap_err();
        assert!(matches!(refused, EnvelopeError::WrongKind { .. }), "{refused}");
        let refused = open(&foreign(ours(), ours(), signer()), Kind::Manifest).unwrap_err();
        assert_eq!(refused, EnvelopeError::UnprotectedHeader);

        // A signer with another algorithm's number is nobody.
        let es256 = HeaderBuilder::new().algorithm(iana::Algorithm::ES256).key_id(signer().key_id).build();
        let opened = open(&foreign(ours(), none(), es256), Kind::Manifest).unwrap();
        assert!(opened.signed_by(&[key(1).public()]).unwrap().signers.is_empty());
    }

    #[test]
    fn protected_headers_have_one_reading_too() {
        // {3: type, 1: -8}: out of order, inside the byte string that is signed.
        let bytes = sign(Kind::Manifest, vec![0xa0], &[key(1)]).unwrap();
        let content_type = Kind::Manifest.content_type().as_bytes();
        let mut protected = vec![0xa2, 0x03, 0x78, u8::try_from(content_type.len()).unwrap()];
        protected.extend_from_slice(content_type);
        protected.extend_from_slice(&[0x01, 0x27]);
        let mut cose = CoseSign::from_slice(&bytes).unwrap();
        cose.protected.original_data = Some(protected);
        let refused = open(&cose.to_vec().unwrap(), Kind::Manifest).unwrap_err();
        assert!(matches!(refused, EnvelopeError::Cbor(_) | EnvelopeError::NotCose { .. }), "{refused}");
    }

    #[test]
    fn the_published_frame_does_not_change() {
        // COSE_Sign: [protected, {}, payload, [[protected, {}, signature]]]; a device in the field must go on reading it.
        let bytes = sign(Kind::Manifest, vec![0xa0], &[key(1)]).unwrap();
        let cose: Vec<serde_cbor::Value> = serde_cbor::from_slice(&bytes).unwrap();
        assert_eq!(cose.len(), 4);
        let serde_cbor::Value::Bytes(protected) = &cose[0] else { panic!("{cose:?}") };
        assert_eq!(&protected[..3], [0xa1, 0x03, 0x78]);
        assert_eq!(&protected[4..], Kind::Manifest.content_type().as_bytes());
        assert_eq!(cose[2], serde_cbor::Value::Bytes(vec![0xa0]));
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..512)) {
            let _ = open(&bytes, Kind::Manifest);
            let _ = verify1(&bytes, Kind::Report, &key(1).public());
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = sign(Kind::Manifest, b"\xa1\x61a\x01".to_vec(), &[key(1)]).unwrap();
        let believed = |bytes: &[u8]| {
            let signed = open(bytes, Kind::Manifest).and_then(|open| open.signed_by(&[key(1).public()]));
            signed.is_ok_and(|signed| !signed.signers.is_empty())
        };
        assert!(believed(&bytes));
        for at in 0..bytes.len() {
            assert!(!believed(&bytes[..at]), "cut at {at}");
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(!believed(&flipped), "bit {bit} of byte {at}");
            }
        }
    }
}
