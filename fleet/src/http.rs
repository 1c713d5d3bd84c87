//! Addresses, headers and status codes of the fleet protocol (`docs/fleet.md`). Each handler reads its input, asks
//! `devices` and `db`, and answers; nothing is decided about documents here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use edged_model::fleet::{
    Accepted, COSE_MEDIA_TYPE, DeviceStatus, EnrollRequest, MANIFEST_MAX_BYTES, REPORT_MAX_BYTES, ReceivedReport,
    ReportAccepted, TRUST_HEADER, Token, TokenRequest, TrustStored, WAIT_MAX_SECS,
};
use edged_model::id::{DeviceId, Digest, GroupName};
use edged_model::quantity::Timestamp;
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::Instant;

use crate::App;
use crate::db::{Db, DbError, EnrollOutcome, ReportOutcome, Scope, StoredManifest, TokenRow};
use crate::devices;
use crate::problem::Failure;

/// From a request's header to the last byte of its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Read from a body that is too large, before the answer.
const DROPPED_MAX_BYTES: usize = 4 << 20;
const JSON_MAX_BYTES: usize = 16 << 10;
const DEVICES_PER_PAGE: u32 = 1000;
const REPORTS_PER_PAGE: u32 = 100;
const TOKEN_VALID_SECS: u64 = 86_400;

type Shared = State<Arc<App>>;
type Answer = Result<Response, Failure>;

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/v1/enroll", post(enroll))
        .route("/v1/tokens", post(make_token))
        .route("/v1/devices", get(list_devices))
        .route("/v1/devices/{id}", get(get_device).delete(forget_device_key))
        .route("/v1/devices/{id}/groups", put(set_groups))
        .route("/v1/devices/{id}/manifest", get(get_manifest).put(put_device_manifest))
        .route("/v1/devices/{id}/reports", get(list_reports).post(take_report))
        .route("/v1/trust/{version}", get(get_trust_root).put(put_trust_root))
        .route("/v1/groups/{group}/manifest", put(put_group_manifest))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is nothing at this address"))
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this address does not know this method")
        })
        .with_state(app)
}

/// Runs a database call on a thread that may wait.
async fn ask<T: Send + 'static>(
    app: &App,
    call: impl FnOnce(&dyn Db) -> Result<T, DbError> + Send + 'static,
) -> Result<T, Failure> {
    let db = Arc::clone(&app.db);
    Ok(tokio::task::spawn_blocking(move || call(db.as_ref())).await??)
}

fn device_id(text: &str) -> Result<DeviceId, Failure> {
    DeviceId::parse(text).map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()).code("badName"))
}

async fn read_body(body: Body, max: usize) -> Result<Vec<u8>, Failure> {
    match tokio::time::timeout(BODY_TIMEOUT, read_whole(body, max)).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => {
            let detail = format!("the body is larger than {max} bytes");
            Err(Failure::new(StatusCode::PAYLOAD_TOO_LARGE, detail).code("tooLarge"))
        }
        Ok(Err(error)) => Err(Failure::new(StatusCode::BAD_REQUEST, format!("the body broke off: {error}"))),
        Err(_) => Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    }
}

/// The body, or `None` if it is too large: then a part of the rest is still read and dropped, because a peer that is in
/// the middle of sending would only see a broken pipe, and not why.
async fn read_whole(mut body: Body, max: usize) -> Result<Option<Vec<u8>>, axum::Error> {
    let mut bytes = Vec::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        seen += data.len();
        if seen <= max {
            bytes.extend_from_slice(&data);
        } else if seen > max + DROPPED_MAX_BYTES {
            break;
        }
    }
    Ok((seen <= max).then_some(bytes))
}

async fn read_json<T: DeserializeOwned>(body: Body) -> Result<T, Failure> {
    let bytes = read_body(body, JSON_MAX_BYTES).await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, format!("the body: {error}")).code("malformed"))
}

/// Lets only the operator through. Hashes are compared, so the time it takes says nothing about the token.
fn operator(app: &App, headers: &HeaderMap) -> Result<(), Failure> {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = given.and_then(|text| text.strip_prefix("Bearer "));
    if token.is_some_and(|token| Digest::of(token.trim().as_bytes()) == app.operator_token) {
        return Ok(());
    }
    let detail = if given.is_some() { "this is not the operator's token" } else { "this needs the operator's token" };
    Err(Failure::new(StatusCode::UNAUTHORIZED, detail)
        .code("notOperator")
        .next("send `Authorization: Bearer <token>`")
        .header(header::WWW_AUTHENTICATE, "Bearer"))
}

async fn healthz(State(app): Shared) -> Answer {
    ask(&app, |db| db.devices(None, 1)).await?;
    Ok("ok\n".into_response())
}

// ---- the device's side ----

/// `Prefer: wait=N` (RFC 7240), at most `WAIT_MAX_SECS`.
fn wait_secs(headers: &HeaderMap) -> u64 {
    let values = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    let mut preferences = values.flat_map(|text| text.split([',', ';']));
    let wait = preferences.find_map(|text| {
        let (name, value) = text.split_once('=')?;
        if name.trim().eq_ignore_ascii_case("wait") { value.trim().trim_matches('"').parse::<u64>().ok() } else { None }
    });
    wait.unwrap_or(0).min(WAIT_MAX_SECS)
}

/// `If-None-Match` (RFC 9110, section 13.1.2), compared weakly.
fn has_it_already(headers: &HeaderMap, etag: &str) -> bool {
    let values = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = values.flat_map(|text| text.split(','));
    tags.any(|tag| {
        let tag = tag.trim();
        tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag
    })
}

/// The newest manifest of a device, or the news that there is none yet, at once or when the asked time is over.
async fn get_manifest(State(app): Shared, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    let device = device_id(&id)?;
    let wait = wait_secs(&headers);
    let deadline = Instant::now() + Duration::from_secs(wait);
    // Before the first look: what is stored between the look and the wait is news.
    let mut news = app.news.subscribe();
    let mut trust_news = app.trust_news.subscribe();
    let (now, polled) = ((app.clock)(), device.clone());
    ask(&app, move |db| db.polled(&polled, now)).await?;
    let mut response = loop {
        let wanted = device.clone();
        let wanted = ask(&app, move |db| db.wanted(&wanted)).await?;
        let etag = wanted.manifest.as_ref().map(|stored| format!("\"{}\"", stored.summary.digest));
        let answer = match (wanted.manifest, etag) {
            (Some(stored), Some(etag)) if !has_it_already(&headers, &etag) => manifest_answer(stored, &etag),
            (_, etag) => {
                let has_news = tokio::select! {
                    has_news = news_for(&mut news, &device, &wanted.groups, deadline) => has_news,
                    // Told by the header of an answer without a manifest.
                    Ok(()) = trust_news.changed() => false,
                };
                if has_news {
                    continue;
                }
                no_news(&device, etag.as_deref())
            }
        };
        break answer;
    };
    let trust_root = ask(&app, |db| db.newest_trust_root()).await?;
    if trust_root > 0 {
        response.headers_mut().insert(TRUST_HEADER, trust_root.into());
    }
    if wait > 0
        && let Ok(value) = HeaderValue::from_str(&format!("wait={wait}"))
    {
        response.headers_mut().insert("preference-applied", value);
    }
    Ok(response)
}

fn trust_version(text: &str) -> Result<u64, Failure> {
    let bad =
        |_| Failure::new(StatusCode::BAD_REQUEST, format!("`{text}` is no version of a trust root")).code("badName");
    text.parse().map_err(bad)
}

/// A device asks for the version after its own, and so on until there is none.
async fn get_trust_root(State(app): Shared, Path(version): Path<String>) -> Answer {
    let version = trust_version(&version)?;
    match ask(&app, move |db| db.trust_root(version)).await? {
        Some(envelope) => {
            let headers = [(header::CONTENT_TYPE, COSE_MEDIA_TYPE), (header::CACHE_CONTROL, "no-cache")];
            Ok((headers, envelope).into_response())
        }
        None => {
            let detail = format!("there is no trust root of version {version} or above");
            Err(Failure::new(StatusCode::NOT_FOUND, detail).code("noTrustRoot"))
        }
    }
}

async fn put_trust_root(State(app): Shared, Path(version): Path<String>, headers: HeaderMap, body: Body) -> Answer {
    operator(&app, &headers)?;
    let version = trust_version(&version)?;
    let envelope = read_body(body, MANIFEST_MAX_BYTES).await?;
    let (root, warnings) = devices::check_trust_root(version, envelope, (app.clock)())?;
    let digest = root.digest;
    ask(&app, move |db| db.put_trust_root(&root)).await?;
    app.trust_news.send_replace(());
    Ok(Json(TrustStored { version, digest, warnings }).into_response())
}

fn manifest_answer(stored: StoredManifest, etag: &str) -> Response {
    let headers = [(header::CONTENT_TYPE, COSE_MEDIA_TYPE), (header::ETAG, etag), (header::CACHE_CONTROL, "no-cache")];
    (headers, stored.envelope).into_response()
}

fn no_news(device: &DeviceId, etag: Option<&str>) -> Response {
    match etag {
        Some(etag) => (StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response(),
        None => Failure::new(StatusCode::NOT_FOUND, format!("there is no manifest for device `{device}` yet"))
            .code("noManifest")
            .into_response(),
    }
}

/// Waits until something was stored that this device may want; `false` at the deadline.
async fn news_for(
    news: &mut broadcast::Receiver<Scope>,
    device: &DeviceId,
    groups: &[GroupName],
    deadline: Instant,
) -> bool {
    loop {
        match tokio::time::timeout_at(deadline, news.recv()).await {
            Ok(Ok(Scope::Device(changed))) if changed == *device => return true,
            Ok(Ok(Scope::Group(changed))) if groups.contains(&changed) => return true,
            Ok(Ok(_)) => {}
            // Some news was missed: look again.
            Ok(Err(RecvError::Lagged(_))) => return true,
            Ok(Err(RecvError::Closed)) | Err(_) => return false,
        }
    }
}

async fn take_report(State(app): Shared, Path(id): Path<String>, body: Body) -> Answer {
    let device = device_id(&id)?;
    let not_enrolled = || {
        Failure::new(StatusCode::FORBIDDEN, format!("device `{device}` is not enrolled"))
            .code("notEnrolled")
            .next("enrol it with a token: POST /v1/enroll")
    };
    let asked = device.clone();
    let Some(key) = ask(&app, move |db| db.device_key(&asked)).await? else { return Err(not_enrolled()) };
    let envelope = read_body(body, REPORT_MAX_BYTES).await?;
    let (report, row) = devices::check_report(&device, &key, envelope, (app.clock)())?;
    let (asked, number) = (device.clone(), report.number);
    match ask(&app, move |db| db.add_report(&asked, &row)).await? {
        ReportOutcome::Stored => Ok((StatusCode::ACCEPTED, Json(ReportAccepted { number })).into_response()),
        ReportOutcome::Replayed { last } => {
            let detail = format!("report {number} of device `{device}` is not above {last}, the last one that came");
            Err(Failure::new(StatusCode::CONFLICT, detail).code("reportReplayed").last_number(last))
        }
        ReportOutcome::NotEnrolled => Err(not_enrolled()),
    }
}

async fn enroll(State(app): Shared, body: Body) -> Answer {
    let request: EnrollRequest = read_json(body).await?;
    let enrollment = devices::check_enrollment(request)?;
    let (device, now) = (enrollment.device.clone(), (app.clock)());
    match ask(&app, move |db| db.enroll(&enrollment, now)).await? {
        EnrollOutcome::Created(enrolled) => {
            tracing::info!(%device, key = %enrolled.key_id, "enrolled");
            let _ = app.news.send(Scope::Device(device));
            Ok((StatusCode::CREATED, Json(enrolled)).into_response())
        }
        EnrollOutcome::Already(enrolled) => Ok((StatusCode::OK, Json(enrolled)).into_response()),
        EnrollOutcome::TokenRefused => {
            tracing::warn!(%device, "enrolment refused: token");
            let detail = format!("the token does not let device `{device}` in: unknown, used, expired or for another");
            Err(Failure::new(StatusCode::FORBIDDEN, detail)
                .code("tokenRefused")
                .next("make a new one: edgefleet token create"))
        }
        EnrollOutcome::OtherKey { enrolled } => {
            tracing::warn!(%device, %enrolled, "enrolment refused: another key is enrolled");
            let detail = format!("device `{device}` is enrolled with another key, {enrolled}");
            Err(Failure::new(StatusCode::CONFLICT, detail)
                .code("otherKey")
                .next(format!("if the device was replaced: DELETE /v1/devices/{device}, then enrol again")))
        }
    }
}

// ---- the operator's side ----

async fn make_token(State(app): Shared, headers: HeaderMap, body: Body) -> Answer {
    operator(&app, &headers)?;
    let bytes = read_body(body, JSON_MAX_BYTES).await?;
    let request: TokenRequest = if bytes.is_empty() {
        TokenRequest::default()
    } else {
        serde_json::from_slice(&bytes)
            .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, format!("the body: {error}")).code("malformed"))?
    };
    let now = (app.clock)();
    let token = crate::new_token().map_err(|error| {
        tracing::error!(%error, "no random numbers");
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, "no token can be made now").code("noRandom")
    })?;
    let token = ask(&app, move |db| add_token(db, token, request, now)).await?;
    Ok((StatusCode::CREATED, Json(token)).into_response())
}

/// Stores the hash of a new token.
pub fn add_token(db: &dyn Db, token: String, request: TokenRequest, now: Timestamp) -> Result<Token, DbError> {
    let valid = request.valid_secs.unwrap_or(TOKEN_VALID_SECS).min(10 * 366 * 86_400);
    let expires = Timestamp(now.0.saturating_add(i64::try_from(valid).unwrap_or(i64::MAX)));
    let hash = Digest::of(token.as_bytes());
    db.add_token(&TokenRow { hash, device: request.device, groups: request.groups, expires })?;
    Ok(Token { token, expires })
}

async fn put_device_manifest(State(app): Shared, Path(id): Path<String>, headers: HeaderMap, body: Body) -> Answer {
    operator(&app, &headers)?;
    put_manifest(&app, Scope::Device(device_id(&id)?), body).await
}

async fn put_group_manifest(State(app): Shared, Path(group): Path<String>, headers: HeaderMap, body: Body) -> Answer {
    operator(&app, &headers)?;
    let group = GroupName::parse(&group)
        .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()).code("badName"))?;
    put_manifest(&app, Scope::Group(group), body).await
}

async fn put_manifest(app: &App, scope: Scope, body: Body) -> Answer {
    let envelope = read_body(body, MANIFEST_MAX_BYTES).await?;
    let checked = devices::check_manifest(&scope, envelope, (app.clock)())?;
    let (sequence, digest) = (checked.manifest.sequence, checked.manifest.digest);
    let (stored_scope, manifest) = (scope.clone(), checked.manifest);
    let before = ask(app, move |db| db.put_manifest(&stored_scope, &manifest)).await?;
    // Nobody waits: nobody to tell.
    let _ = app.news.send(scope);
    let mut warnings = checked.warnings;
    warnings.extend(devices::sequence_warning(before, sequence));
    Ok(Json(Accepted { sequence, digest, state: None, warnings }).into_response())
}

async fn list_devices(
    State(app): Shared,
    headers: HeaderMap,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<Vec<DeviceStatus>>, Failure> {
    operator(&app, &headers)?;
    let after = query.get("after").map(|text| device_id(text)).transpose()?;
    let limit = limit(&query, DEVICES_PER_PAGE)?;
    let rows = ask(&app, move |db| db.devices(after.as_ref(), limit)).await?;
    Ok(Json(rows.into_iter().map(devices::status).collect::<Result<_, _>>()?))
}

fn limit(query: &BTreeMap<String, String>, most: u32) -> Result<u32, Failure> {
    let Some(text) = query.get("limit") else { return Ok(most) };
    let bad = |_| Failure::new(StatusCode::BAD_REQUEST, format!("limit `{text}` is not a number")).code("badQuery");
    Ok(text.parse::<u32>().map_err(bad)?.min(most))
}

fn unknown_device(device: &DeviceId) -> Failure {
    Failure::new(StatusCode::NOT_FOUND, format!("device `{device}` is not known here")).code("unknownDevice")
}

async fn get_device(
    State(app): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<DeviceStatus>, Failure> {
    operator(&app, &headers)?;
    let device = device_id(&id)?;
    let asked = device.clone();
    let row = ask(&app, move |db| db.device(&asked)).await?;
    Ok(Json(devices::status(row.ok_or_else(|| unknown_device(&device))?)?))
}

async fn forget_device_key(State(app): Shared, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    operator(&app, &headers)?;
    let device = device_id(&id)?;
    let asked = device.clone();
    if ask(&app, move |db| db.forget_key(&asked)).await? {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(unknown_device(&device))
    }
}

async fn set_groups(State(app): Shared, Path(id): Path<String>, headers: HeaderMap, body: Body) -> Answer {
    operator(&app, &headers)?;
    let device = device_id(&id)?;
    let groups: Vec<GroupName> = read_json(body).await?;
    let asked = device.clone();
    if !ask(&app, move |db| db.set_groups(&asked, &groups)).await? {
        return Err(unknown_device(&device));
    }
    let _ = app.news.send(Scope::Device(device));
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn list_reports(
    State(app): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<Vec<ReceivedReport>>, Failure> {
    operator(&app, &headers)?;
    let device = device_id(&id)?;
    let limit = limit(&query, REPORTS_PER_PAGE)?;
    let rows = ask(&app, move |db| db.reports(&device, limit)).await?;
    Ok(Json(rows.iter().map(devices::received).collect::<Result<_, _>>()?))
}
