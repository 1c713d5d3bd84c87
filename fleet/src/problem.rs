//! Every error leaves as `application/problem+json` (RFC 9457). What went wrong inside is logged here, once, and not
//! told to strangers.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use edged_model::fleet::Problem;
use edged_model::reason::Reason;

use crate::db::DbError;

/// A request that was not done, and how to say so.
#[derive(Debug)]
pub struct Failure {
    problem: Box<Problem>,
    header: Option<(header::HeaderName, HeaderValue)>,
}

impl Failure {
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Self { problem: Box::new(Problem::new(status.as_u16(), title, detail)), header: None }
    }

    #[must_use]
    pub fn code(mut self, code: &str) -> Self {
        self.problem.code = Some(code.to_owned());
        self
    }

    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.problem.next = Some(next.into());
        self
    }

    #[must_use]
    pub fn last_number(mut self, number: u64) -> Self {
        self.problem.last_number = Some(number);
        self
    }

    #[must_use]
    pub fn header(mut self, name: header::HeaderName, value: &'static str) -> Self {
        self.header = Some((name, HeaderValue::from_static(value)));
        self
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { problem: Box::new(Problem::refused(&reason)), header: None }
    }
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        tracing::error!(%error, source, "the database did not answer");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the database did not answer; try again later")
            .code("databaseUnavailable")
            .header(header::RETRY_AFTER, "5")
    }
}

impl From<tokio::task::JoinError> for Failure {
    fn from(error: tokio::task::JoinError) -> Self {
        tracing::error!(%error, "a request's work panicked");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be finished").code("internal")
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&*self.problem).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response
    }
}
