//! The HTTP surface. Errors are problem documents (RFC 9457).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post, put};
use edged_model::cbor::{self, MAX_DOCUMENT_BYTES};
use edged_model::envelope::{self, Kind};
use edged_model::id::{DeviceId, GroupName};
use edged_model::keys::PublicKey;
use edged_model::report::Report;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::db::{Db, DbError, DeviceRow, Enrolled, Selector};

/// The longest a device may wait for a manifest in one request.
const WAIT_MAX: Duration = Duration::from_secs(300);
const REPORTS_LIMIT: u32 = 50;

/// What every request sees.
pub struct App {
    pub db: Db,
    /// Counts up with each manifest: wakes those who wait for one.
    pub manifests: watch::Sender<u64>,
    /// The time, given by the program.
    pub clock: fn() -> i64,
}

/// An error as a problem document.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    title: String,
}

impl Problem {
    fn new(status: StatusCode, title: impl Into<String>) -> Self {
        Self { status, title: title.into() }
    }
}

impl From<DbError> for Problem {
    fn from(error: DbError) -> Self {
        eprintln!("edgefleet: {error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the database failed")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "title": self.title, "status": self.status.as_u16() }).to_string();
        (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}

type Shared = State<Arc<App>>;

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/v1/enroll", post(enroll))
        .route("/v1/tokens", post(create_token))
        .route("/v1/devices", get(list))
        .route("/v1/devices/{id}", get(show))
        .route("/v1/devices/{id}/manifest", get(fetch).put(put_for_device))
        .route("/v1/devices/{id}/reports", post(report).get(reports))
        .route("/v1/groups/{group}/manifest", put(put_for_group))
        .layer(DefaultBodyLimit::max(MAX_DOCUMENT_BYTES))
        .with_state(app)
}

fn operator(app: &App, headers: &HeaderMap) -> Result<(), Problem> {
    let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    match token {
        Some(token) if app.db.is_operator(token)? => Ok(()),
        Some(_) => Err(Problem::new(StatusCode::FORBIDDEN, "this is not the operator's token")),
        None => Err(Problem::new(StatusCode::UNAUTHORIZED, "the operator's token is needed (Authorization: Bearer …)")),
    }
}

fn device(id: &str) -> Result<DeviceId, Problem> {
    DeviceId::parse(id).map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Enrolment {
    device: String,
    token: String,
    public_key: String,
}

async fn enroll(State(app): Shared, body: Bytes) -> Result<StatusCode, Problem> {
    let bad = |text: String| Problem::new(StatusCode::BAD_REQUEST, text);
    let enrolment: Enrolment = serde_json::from_slice(&body).map_err(|error| bad(error.to_string()))?;
    let id = device(&enrolment.device)?;
    let key = PublicKey::from_pem(&enrolment.public_key).map_err(|error| bad(error.to_string()))?;
    let key = key.to_spki().map_err(|error| bad(error.to_string()))?;
    match app.db.enroll(id.as_str(), &key, &enrolment.token)? {
        Enrolled::New => Ok(StatusCode::CREATED),
        Enrolled::Again => Ok(StatusCode::OK),
        Enrolled::OtherKey => Err(Problem::new(StatusCode::CONFLICT, format!("{id} is enrolled with another key"))),
        Enrolled::BadToken => Err(Problem::new(StatusCode::FORBIDDEN, "the token is unknown or was used")),
    }
}

#[derive(Deserialize, Default)]
struct TokenWish {
    group: Option<String>,
}

async fn create_token(State(app): Shared, headers: HeaderMap, Query(wish): Query<TokenWish>) -> Result<Response, Problem> {
    operator(&app, &headers)?;
    let token = app.db.create_token(wish.group.as_deref())?;
    Ok((StatusCode::CREATED, Json(serde_json::json!({ "token": token }))).into_response())
}

async fn put_for_device(State(app): Shared, Path(id): Path<String>, headers: HeaderMap, body: Bytes) -> Result<Response, Problem> {
    operator(&app, &headers)?;
    let id = device(&id)?;
    put_manifest(&app, Selector::Device(id.as_str()), &body)
}

async fn put_for_group(State(app): Shared, Path(group): Path<String>, headers: HeaderMap, body: Bytes) -> Result<Response, Problem> {
    operator(&app, &headers)?;
    let group = GroupName::parse(&group).map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))?;
    put_manifest(&app, Selector::Group(group.as_str()), &body)
}

fn put_manifest(app: &App, selector: Selector<'_>, body: &[u8]) -> Result<Response, Problem> {
    // Whether it is to be believed is the devices' to say; that it is one at all is ours.
    envelope::open(body, Kind::Manifest)
        .map_err(|error| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, error.reason("manifest").text))?;
    let digest = app.db.put_manifest(selector, body)?;
    app.manifests.send_modify(|count| *count += 1);
    Ok((StatusCode::ACCEPTED, Json(serde_json::json!({ "digest": digest }))).into_response())
}

/// `Prefer: wait=N` (RFC 7240, 4.3).
fn wish_to_wait(headers: &HeaderMap) -> Duration {
    let prefer = headers.get("prefer").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let seconds = prefer.split([',', ';']).find_map(|part| part.trim().strip_prefix("wait=")?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(WAIT_MAX)
}

async fn fetch(State(app): Shared, Path(id): Path<String>, headers: HeaderMap) -> Result<Response, Problem> {
    let id = device(&id)?;
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let deadline = tokio::time::Instant::now() + wish_to_wait(&headers);
    let mut changes = app.manifests.subscribe();
    loop {
        changes.mark_unchanged();
        let found = app.db.manifest_for(id.as_str())?;
        if let Some((digest, envelope)) = found.as_ref().filter(|(digest, _)| known.as_deref() != Some(&format!("\"{digest}\""))) {
            let headers = [(header::ETAG, format!("\"{digest}\"")), (header::CONTENT_TYPE, Kind::Manifest.content_type().to_owned())];
            return Ok((headers, envelope.clone()).into_response());
        }
        let nothing_new = if found.is_some() { StatusCode::NOT_MODIFIED } else { StatusCode::NOT_FOUND };
        match tokio::time::timeout_at(deadline, changes.changed()).await {
            Ok(Ok(())) => {}
            _ => return Ok(nothing_new.into_response()),
        }
    }
}

async fn report(State(app): Shared, Path(id): Path<String>, body: Bytes) -> Result<StatusCode, Problem> {
    let id = device(&id)?;
    let key = app.db.device_key(id.as_str())?;
    let key = key.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("{id} is not enrolled")))?;
    let bad = |text: String| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, text);
    let key = PublicKey::from_spki(&key).map_err(|error| bad(error.to_string()))?;
    let payload = envelope::verify1(&body, Kind::Report, &key).map_err(|error| bad(error.reason("report").text))?;
    let report: Report = cbor::decode(&payload).map_err(|error| bad(error.to_string()))?;
    if report.device != id {
        return Err(bad(format!("the report is of {}", report.device)));
    }
    if app.db.put_report(id.as_str(), report.number, (app.clock)(), &body)? {
        return Ok(StatusCode::ACCEPTED);
    }
    Err(Problem::new(StatusCode::CONFLICT, format!("report {} is here already, or a newer one", report.number)))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<u32>,
}

async fn reports(
    State(app): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
    Query(limit): Query<Limit>,
) -> Result<Json<Vec<Report>>, Problem> {
    operator(&app, &headers)?;
    let list = app.db.reports(device(&id)?.as_str(), limit.limit.unwrap_or(REPORTS_LIMIT).min(REPORTS_LIMIT))?;
    Ok(Json(list.iter().filter_map(|envelope| believed(envelope)).collect()))
}

/// A report that was verified when it came.
fn believed(envelope: &[u8]) -> Option<Report> {
    cbor::decode(&envelope::payload1(envelope)?).ok()
}

/// A device as operators see it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceView {
    pub device: String,
    pub group: Option<String>,
    /// Unix seconds by the fleet's clock.
    pub last_seen: Option<i64>,
    pub report: Option<Report>,
}

impl From<DeviceRow> for DeviceView {
    fn from(row: DeviceRow) -> Self {
        let report = row.last_report.as_deref().and_then(believed);
        Self { device: row.id, group: row.group, last_seen: row.last_seen, report }
    }
}

async fn list(State(app): Shared, headers: HeaderMap) -> Result<Json<Vec<DeviceView>>, Problem> {
    operator(&app, &headers)?;
    Ok(Json(app.db.devices()?.into_iter().map(DeviceView::from).collect()))
}

async fn show(State(app): Shared, Path(id): Path<String>, headers: HeaderMap) -> Result<Json<DeviceView>, Problem> {
    operator(&app, &headers)?;
    let id = device(&id)?;
    let all: BTreeMap<_, _> = app.db.devices()?.into_iter().map(|row| (row.id.clone(), row)).collect();
    let row = all.get(id.as_str()).cloned();
    row.map(|row| Json(row.into())).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("{id} is not enrolled")))
}
