//! Ed25519 keys as ordinary PEM files: PKCS#8 (RFC 8410) for the private half, SPKI for the public one, so that
//! `openssl genpkey -algorithm ed25519` makes them too.

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, KeypairBytes, spki};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::id::Digest;
use crate::trust::KeyId;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("not an Ed25519 private key in PKCS#8 PEM form (`openssl genpkey -algorithm ed25519` makes one)")]
    NotPrivate,
    #[error("not a public key in SPKI PEM form")]
    NotPublic,
    #[error("not an Ed25519 public key")]
    NotEd25519,
    #[error("the key cannot be encoded")]
    Encoding,
}

/// A private key.
#[derive(Debug, Clone)]
pub struct SecretKey(SigningKey);

impl SecretKey {
    /// From 32 bytes of a cryptographic random source.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        SigningKey::from_pkcs8_pem(pem).map(Self).map_err(|_| KeyError::NotPrivate)
    }

    pub fn to_pem(&self) -> Result<String, KeyError> {
        // Version 1 without the public half: what every tool reads.
        let pair = KeypairBytes { secret_key: self.0.to_bytes(), public_key: None };
        pair.to_pkcs8_pem(LineEnding::LF).map(|pem| pem.to_string()).map_err(|_| KeyError::Encoding)
    }

    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    pub fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        self.0.sign(bytes).to_bytes().to_vec()
    }
}

/// A public Ed25519 key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        Self::from_spki(&spki_of_pem(pem)?)
    }

    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        VerifyingKey::from_public_key_der(der).map(Self).map_err(|_| KeyError::NotEd25519)
    }

    pub fn to_spki(&self) -> Result<Vec<u8>, KeyError> {
        self.0.to_public_key_der().map(|der| der.as_bytes().to_vec()).map_err(|_| KeyError::Encoding)
    }

    pub fn to_pem(&self) -> Result<String, KeyError> {
        self.0.to_public_key_pem(LineEnding::LF).map_err(|_| KeyError::Encoding)
    }

    pub fn id(&self) -> Result<KeyId, KeyError> {
        Ok(Digest::of(&self.to_spki()?))
    }

    /// The strict check: no weak keys, no malleable signatures.
    pub fn verifies(&self, bytes: &[u8], signature: &[u8]) -> bool {
        Signature::from_slice(signature).is_ok_and(|signature| self.0.verify_strict(bytes, &signature).is_ok())
    }
}

/// Ed25519ph (RFC 8032, 5.1): the hash of the text is signed. What cosign 3 makes with an Ed25519 key.
impl PublicKey {
    pub fn verifies_prehashed(&self, bytes: &[u8], signature: &[u8]) -> bool {
        use sha2::Digest as _;
        let hash = sha2::Sha512::new_with_prefix(bytes);
        Signature::from_slice(signature).is_ok_and(|s| self.0.verify_prehashed_strict(hash, None, &s).is_ok())
    }
}

/// The DER inside a public key's PEM, whatever kind of key it is (image keys may be ECDSA).
pub fn spki_of_pem(pem: &str) -> Result<Vec<u8>, KeyError> {
    let (label, document) = spki::der::Document::from_pem(pem).map_err(|_| KeyError::NotPublic)?;
    if label != "PUBLIC KEY" {
        return Err(KeyError::NotPublic);
    }
    Ok(document.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn openssl(args: &[&str]) -> String {
        let output = Command::new("openssl").args(args).output().expect("openssl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn keys_made_by_openssl_are_ours_and_ours_are_openssls() {
        let theirs = SecretKey::from_pem(&openssl(&["genpkey", "-algorithm", "ed25519"])).unwrap();
        let signature = theirs.sign(b"text");
        assert!(theirs.public().verifies(b"text", &signature));
        assert!(!theirs.public().verifies(b"Text", &signature));

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.pem");
        let ours = SecretKey::from_seed(&[7; 32]);
        std::fs::write(&path, ours.to_pem().unwrap()).unwrap();
        let public = openssl(&["pkey", "-in", path.to_str().unwrap(), "-pubout"]);
        assert_eq!(PublicKey::from_pem(&public).unwrap(), ours.public());
        assert_eq!(ours.public().to_pem().unwrap(), public);
    }

    #[test]
    fn a_key_is_named_as_openssl_and_sha256sum_name_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.pub");
        let ours = SecretKey::from_seed(&[9; 32]).public();
        std::fs::write(&path, ours.to_pem().unwrap()).unwrap();
        let der = Command::new("openssl")
            .args(["pkey", "-pubin", "-outform", "DER", "-in"])
            .arg(&path)
            .output()
            .expect("openssl is installed")
            .stdout;
        assert_eq!(ours.id().unwrap(), Digest::of(&der));
    }

    #[test]
    fn an_ecdsa_key_is_kept_as_it_is_and_never_taken_for_ed25519() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ec.pem");
        let private = openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        std::fs::write(&path, &private).unwrap();
        let spki = spki_of_pem(&openssl(&["pkey", "-in", path.to_str().unwrap(), "-pubout"])).unwrap();
        assert_eq!(spki.len(), 91);
        assert_eq!(PublicKey::from_spki(&spki), Err(KeyError::NotEd25519));
        assert_eq!(SecretKey::from_pem(&private).unwrap_err(), KeyError::NotPrivate);
    }

    #[test]
    fn a_secret_does_not_show_itself() {
        let shown = format!("{:?}", SecretKey::from_seed(&[0x5a; 32]));
        assert!(!shown.contains("90, 90") && !shown.to_lowercase().contains("5a5a"), "{shown}");
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(SecretKey::from_pem("hello").unwrap_err(), KeyError::NotPrivate);
        let private = SecretKey::from_seed(&[7; 32]).to_pem().unwrap();
        assert_eq!(spki_of_pem(&private).unwrap_err(), KeyError::NotPublic);
    }
}
