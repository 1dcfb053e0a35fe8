//! [`Identity`], the client of a request, and [`Permit`], the proof that it may do something.

use std::{borrow::Cow, sync::Arc};

use http::Extensions;

use super::grant::{GrantSet, Verb, method_name};
use crate::{
    channel::{Channel, check_label},
    error::{Code, Error, Result},
    event::Draft,
};

/// Longest name of a consumer, in bytes.
pub(crate) const MAX_CONSUMER: usize = 128;

/// Operations of administration, with their names in permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AdminOperation {
    DeleteEvents,
    ListChannels,
    ListConsumers,
    ListConnections,
    KickConnections,
    Metrics,
}

/// The client of a request or connection. Cheap to clone; a transport takes it at the upgrade and keeps it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// `None` while authentication is off, and for a request that has not been authenticated.
    principal: Option<Arc<Principal>>,
    open: OpenAccess,
    /// A web page whose origin is not allowed. Every permit to change something is refused, so that the decision is made on
    /// what the handler has decoded, not on a second reading of the URL.
    read_only: bool,
}

/// What is permitted to a client that is no principal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OpenAccess {
    Nothing,
    /// Authentication is off: everything but administration.
    Client,
    /// Authentication is off, at a listener that only administrators reach.
    Admin,
}

/// A client while authentication is on.
#[derive(Debug)]
pub(crate) struct Principal {
    /// `""` is anonymous.
    pub(crate) subject: Box<str>,
    pub(crate) grants: Vec<Arc<GrantSet>>,
    /// Unix milliseconds, with the leeway of the issuer.
    pub(crate) expires: Option<u64>,
}

/// Proof that an [`Identity`] may do something. Code that acts for a client takes its subject from here.
#[derive(Clone, Copy, Debug)]
#[must_use = "a check whose permit is not used is in the wrong place"]
pub(crate) struct Permit<'a> {
    subject: &'a str,
}

// === impl AdminOperation ===

impl AdminOperation {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            AdminOperation::DeleteEvents => "events:delete",
            AdminOperation::ListChannels => "channels:list",
            AdminOperation::ListConsumers => "consumers:list",
            AdminOperation::ListConnections => "connections:list",
            AdminOperation::KickConnections => "connections:kick",
            AdminOperation::Metrics => "metrics",
        }
    }
}

// === impl Identity ===

impl Default for Identity {
    /// A client that has not been authenticated, and may do nothing.
    fn default() -> Self {
        Identity { principal: None, open: OpenAccess::Nothing, read_only: true }
    }
}

impl Identity {
    /// A client without credentials while authentication is off.
    pub(crate) fn open(admin: bool) -> Self {
        let open = if admin { OpenAccess::Admin } else { OpenAccess::Client };
        Identity { principal: None, open, read_only: false }
    }

    pub(crate) fn new(principal: Principal) -> Self {
        Identity { principal: Some(Arc::new(principal)), open: OpenAccess::Nothing, read_only: false }
    }

    /// The client of a request with these extensions, which the endpoint has authenticated.
    pub(crate) fn of(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or_default()
    }

    /// The same client, for a web page whose origin is not allowed.
    pub(crate) fn read_only(self) -> Self {
        Identity { read_only: true, ..self }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn principal(&self) -> Option<&Principal> {
        self.principal.as_deref()
    }

    /// Name of the identity, the scope of its idempotency keys. `""` is anonymous.
    pub(crate) fn subject(&self) -> &str {
        self.principal().map_or("", |principal| &principal.subject)
    }

    /// Time at which the credential expires, in Unix milliseconds.
    pub(crate) fn expires(&self) -> Option<u64> {
        self.principal()?.expires
    }

    /// To publish an event, with its `from`. Rejects reserved channels (`$…`) as `forbidden`.
    pub(crate) fn may_publish(&self, channel: &Channel, draft: &Draft) -> Result<Permit<'_>> {
        let permit = self.may_write(channel)?;
        if let Some(principal) = self.principal()
            && let Some(from) = draft.from()
            && *from != *principal.subject
        {
            let _ = self.permit(Verb::PublishAs, &from)?;
        }
        Ok(permit)
    }

    /// To change the log of a channel.
    pub(crate) fn may_write(&self, channel: &Channel) -> Result<Permit<'_>> {
        channel.writable()?;
        self.change(Verb::Publish, channel.as_str())
    }

    /// To stream, wait for, read, and look up the history of a channel. `$presence/CHANNEL` needs the permission to list
    /// the members of the channel instead.
    pub(crate) fn may_subscribe(&self, channel: &Channel) -> Result<Permit<'_>> {
        match channel.as_str().strip_prefix("$presence/") {
            Some(of) => self.permit(Verb::Presence, of),
            None => self.permit(Verb::Subscribe, channel.as_str()),
        }
    }

    /// To be a presence member of a channel.
    pub(crate) fn may_join(&self, channel: &Channel) -> Result<Permit<'_>> {
        self.change(Verb::Join, channel.as_str())
    }

    /// To list the members of a channel.
    pub(crate) fn may_list_members(&self, channel: &Channel) -> Result<Permit<'_>> {
        self.permit(Verb::Presence, channel.as_str())
    }

    /// To open a session that other clients see, or through which this client can write.
    pub(crate) fn may_connect(&self) -> Result<Permit<'_>> {
        match self.read_only {
            true => Err(foreign_page()),
            false => Ok(Permit { subject: self.subject() }),
        }
    }

    /// Also validates the name of the service.
    pub(crate) fn may_call(&self, service: &str, method: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        match self.open {
            OpenAccess::Nothing => self.change(Verb::Call, &method_name(service, method)),
            OpenAccess::Client | OpenAccess::Admin => self.may_connect(),
        }
    }

    /// Whether the client may call some method of a service.
    pub(crate) fn may_see(&self, service: &str) -> bool {
        match self.principal() {
            Some(principal) => principal.grants.iter().any(|grants| grants.allows_some_method(service)),
            None => self.open != OpenAccess::Nothing,
        }
    }

    /// Also validates the name of the service, and rejects the reserved names `weir…`, `rpc.…` and `$…`.
    pub(crate) fn may_provide(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        if ["weir", "rpc.", "$"].iter().any(|own| service.starts_with(own)) {
            return Err(Error::params("names of services do not begin with weir, rpc. or $"));
        }
        self.change(Verb::Provide, service)
    }

    /// Also validates the name of the consumer: `[A-Za-z0-9._:-]{1,128}`.
    pub(crate) fn may_consume(&self, consumer: &str) -> Result<Permit<'_>> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if consumer.is_empty() || consumer.len() > MAX_CONSUMER || !consumer.bytes().all(legal) {
            return Err(Error::params("a consumer's name is 1 to 128 of A-Z a-z 0-9 . _ : -"));
        }
        self.change(Verb::Consume, consumer)
    }

    pub(crate) fn may_administer(&self, operation: AdminOperation) -> Result<Permit<'_>> {
        match self.open {
            OpenAccess::Client => Err(Error::new(
                Code::Forbidden,
                "administration needs credentials (auth.key), admin.listen, or a listener that only this machine can reach",
            )
            .with("permission", "admin")),
            _ => self.permit(Verb::Admin, operation.as_str()),
        }
    }

    /// Whether the permissions of the client cover a name.
    pub(super) fn allows(&self, verb: Verb, name: &str) -> bool {
        match self.principal() {
            Some(principal) => principal.grants.iter().any(|grants| grants.allows(verb, name)),
            None => self.open != OpenAccess::Nothing,
        }
    }

    /// Permits what changes something, unless this is a page that may only read.
    fn change(&self, verb: Verb, name: &str) -> Result<Permit<'_>> {
        let _ = self.may_connect()?;
        self.permit(verb, name)
    }

    /// # Errors
    /// `unauthorized` for an anonymous client, `forbidden` for others. The error depends on the name only, not on whether it
    /// exists.
    fn permit(&self, verb: Verb, name: &str) -> Result<Permit<'_>> {
        if self.allows(verb, name) {
            return Ok(Permit { subject: self.subject() });
        }
        let (code, detail): (_, Cow<'static, str>) = match self.subject() {
            "" => (Code::Unauthorized, "this needs credentials: send Authorization: Bearer with a key or token".into()),
            subject => (Code::Forbidden, format!("{subject} is not permitted to {}: {name}", verb.as_str()).into()),
        };
        Err(Error::new(code, detail).with("permission", verb.as_str()))
    }
}

impl<'a> Permit<'a> {
    pub(crate) fn subject(self) -> &'a str {
        self.subject
    }
}

/// The error for a web page whose origin is not allowed.
pub(crate) fn foreign_page() -> Error {
    Error::new(Code::Forbidden, "pages of this origin are not permitted to do this: add the origin to cors.origins")
        .with("permission", "origin")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(from: Option<&str>) -> Draft {
        Draft::new(crate::event::DraftParts { from, ..Default::default() }, 1_000).unwrap()
    }

    #[test]
    fn reserved_and_malformed_names_are_rejected() {
        let identity = Identity::open(true);
        let services = Channel::parse("$services").unwrap();
        assert_eq!(identity.may_publish(&services, &draft(None)).unwrap_err().code(), Code::Forbidden);
        assert!(identity.may_subscribe(&services).is_ok());
        for bad in ["weir", "weir/x", "rpc.x", "$x", "", "a\nb"] {
            assert_eq!(identity.may_provide(bad).unwrap_err().code(), Code::InvalidParams, "{bad:?}");
        }
        assert!(identity.may_call("weir", "echo").is_ok());
        for bad in ["", "a/b", "é", "a b", &"x".repeat(129)] {
            assert_eq!(identity.may_consume(bad).unwrap_err().code(), Code::InvalidParams, "{bad:?}");
        }
        assert!(identity.may_consume("batch-1:a.b_C").is_ok());
    }

    #[test]
    fn a_request_that_was_not_authenticated_may_do_nothing() {
        let identity = Identity::of(&Extensions::new());
        let channel = Channel::parse("a").unwrap();
        assert!(identity.may_subscribe(&channel).is_err() && identity.may_publish(&channel, &draft(None)).is_err());
        assert!(identity.may_administer(AdminOperation::Metrics).is_err() && !identity.may_see("a"));
    }
}
