//! Tells the fleet our public key, with the one-time token from the configuration. Doing it twice does no harm.

use edged_model::fleet::EnrollRequest;
use edged_model::reason::{Code, Reason};

use super::{Endpoint, FleetLine, refusal};

/// A file named in place of the token is read no further than this.
const TOKEN_MAX_BYTES: usize = 4096;

/// The token itself, or what is in the file that is named by its absolute path.
fn read_token(configured: &str) -> Result<String, Reason> {
    if !configured.starts_with('/') {
        return Ok(configured.trim().to_owned());
    }
    let bad = |text: String| Reason::new(Code::FleetUnavailable, format!("fleet.enroll-token {configured}: {text}"));
    let text = std::fs::read_to_string(configured).map_err(|error| bad(error.to_string()))?;
    if text.len() > TOKEN_MAX_BYTES {
        return Err(bad(format!("{} bytes; a token has at most {TOKEN_MAX_BYTES}", text.len())));
    }
    Ok(text.trim().to_owned())
}

pub(super) fn enroll(line: &FleetLine, endpoint: &Endpoint, token: Option<&str>) -> Result<(), Reason> {
    let unavailable = |text: String| Reason::new(Code::FleetUnavailable, text);
    let Some(token) = token else {
        return Err(
            unavailable("the fleet does not know this device".to_owned()).next("set fleet.enroll-token in agent.toml")
        );
    };
    let request = EnrollRequest {
        device: line.shared.device.clone(),
        token: read_token(token)?,
        public_key: line.shared.key.public().to_pem().map_err(|error| unavailable(error.to_string()))?,
        groups: line.shared.groups.clone(),
    };
    let body = serde_json::to_vec(&request).map_err(|error| unavailable(error.to_string()))?;
    let url = format!("{}/enroll", endpoint.base);
    let sent = endpoint.agent.post(&url).header("content-type", "application/json").send(&body[..]);
    let response = sent.map_err(|error| unavailable(format!("{url}: {error}")))?;
    if response.status().is_success() {
        tracing::info!(url, "enrolled with the fleet");
        return Ok(());
    }
    let reason = refusal(&url, response).reason;
    Err(if reason.next.is_empty() { reason.next("check fleet.enroll-token in agent.toml") } else { reason })
}
