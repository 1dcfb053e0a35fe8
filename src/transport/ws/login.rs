//! `weir.auth`: a client of a WebSocket logs in, or replaces its token before it expires.

use futures_util::FutureExt as _;
use serde_json::value::RawValue;

use super::{
    params,
    session::{MethodOutcome, RpcSession},
    subscriptions::ReadySubscription,
    work::{JobOrder, JobOutput},
};
use crate::{
    auth::Identity,
    error::{Code, Error, Result},
};

/// A connection that sends so many invalid credentials is closed.
const MAX_FAILED_LOGINS: u8 = 5;

impl RpcSession {
    pub(super) fn authenticate(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let params::AuthParams { token } = params::read(params)?;
        if !self.node.auth.is_on() {
            // Every client is anonymous, whatever its token: the answer has `anonymous`.
            let answer = serde_json::json!({ "subject": "", "expires": null, "anonymous": true });
            return Ok(MethodOutcome::Result(answer.to_string().into_bytes()));
        }
        let node = self.node.clone();
        let mut verifying = Box::pin(async move { node.auth.verify(&token).await });
        // Only a token whose key is fetched from its issuer takes time. Otherwise the next message has the new permissions.
        match verifying.as_mut().now_or_never() {
            Some(verified) => verified
                .and_then(|identity| self.log_in(identity))
                .map(MethodOutcome::Result)
                .inspect_err(|error| self.count_failed_login(error)),
            None => {
                let work = async move { Ok(JobOutput::Login(verifying.await)) };
                Ok(MethodOutcome::Later { work: Box::pin(work), bytes: 0, order: JobOrder::Alone })
            }
        }
    }

    /// Takes the new identity. What it does not permit any more ends, and is listed in the answer.
    ///
    /// # Errors
    /// `forbidden` if the connection belongs to another subject.
    pub(super) fn log_in(&mut self, identity: Identity) -> Result<Vec<u8>> {
        if !self.identity.subject().is_empty() && self.identity.subject() != identity.subject() {
            return Err(Error::new(Code::Forbidden, "this connection belongs to another subject: open another one"));
        }
        // A token is the authority of the page itself, whatever its origin: no browser adds it. What was begun without one
        // does not become the subject's.
        let renewed = self.identity.subject() == identity.subject();
        let mut channels = Vec::new();
        if let Some(subscriptions) = &mut self.subscriptions {
            channels = subscriptions.end_unless(
                |channel| identity.may_subscribe(channel).is_ok(),
                |channel| renewed && identity.may_join(channel).is_ok(),
            );
            if subscriptions.len() == 0 {
                self.subscriptions = None;
            }
        }
        let mut services = Vec::new();
        if let Some(hub) = &self.hub {
            services = hub.provided_services().names();
            services.retain(|service| {
                (!renewed || identity.may_provide(service).is_err()) && hub.withdraw(service).is_ok()
            });
        }
        let answer = serde_json::json!({
            "subject": identity.subject(),
            "expires": identity.expires(),
            "ended": { "channels": channels, "services": services },
        });
        if let Some(registration) = &self.registration {
            registration.set_identity(identity.clone());
        }
        self.identity = identity;
        Ok(answer.to_string().into_bytes())
    }

    pub(super) fn count_failed_login(&mut self, error: &Error) {
        if !matches!(error.code(), Code::Unauthorized | Code::TokenExpired) {
            return;
        }
        self.failed_logins += 1;
        if self.failed_logins >= MAX_FAILED_LOGINS {
            self.outbox.close_with(Code::Unauthorized);
        }
    }

    /// The error for the first subscription that the client may not have: it may have logged in meanwhile.
    pub(super) fn first_refused(&self, list: &[ReadySubscription]) -> Option<Error> {
        let joins =
            |lease: &Option<_>, channel| lease.is_some().then(|| self.identity.may_join(channel).err()).flatten();
        list.iter().find_map(|(request, _, lease)| {
            self.identity.may_subscribe(&request.channel).err().or_else(|| joins(lease, &request.channel))
        })
    }
}
