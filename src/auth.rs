//! [`Identity`], the client of a request, and [`Permit`], the proof that it may do something.
//!
//! There are no credentials yet: every client is anonymous and may do everything, which is why weir listens on loopback
//! only unless configured otherwise. The exception is a web page whose origin is not allowed: it may only read.

use http::Extensions;

use crate::{
    channel::{Channel, check_label},
    error::{Code, Error, Result},
};

/// Longest name of a consumer, in bytes.
pub(crate) const MAX_CONSUMER: usize = 128;

/// The client of a request or connection. Cheap to clone; a transport takes it at the upgrade and keeps it.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    read_only: bool,
}

/// Proof that an [`Identity`] may do something. Code that acts for a client takes its subject from here.
#[derive(Clone, Copy, Debug)]
#[must_use = "a check whose permit is not used is in the wrong place"]
pub(crate) struct Permit<'a> {
    subject: &'a str,
}

impl Identity {
    /// A client without credentials.
    pub(crate) fn anonymous() -> Self {
        Identity { read_only: false }
    }

    /// A web page whose origin is not allowed. Every permit to change something is refused, so that the decision is made
    /// on what the handler has decoded, not on a second reading of the URL.
    pub(crate) fn read_only() -> Self {
        Identity { read_only: true }
    }

    /// The client of a request with these extensions.
    pub(crate) fn of(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or_default()
    }

    /// Name of the identity, the scope of its idempotency keys. `""` is anonymous.
    pub(crate) fn subject(&self) -> &str {
        ""
    }

    /// Rejects reserved channels (`$…`) as `forbidden`.
    pub(crate) fn may_publish(&self, channel: &Channel) -> Result<Permit<'_>> {
        channel.writable()?;
        self.change()
    }

    pub(crate) fn may_subscribe(&self, _channel: &Channel) -> Result<Permit<'_>> {
        self.permit()
    }

    /// Also validates the name of the service.
    pub(crate) fn may_call(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        self.change()
    }

    /// Also validates the name of the service, and rejects the reserved names `weir…`, `rpc.…` and `$…`.
    pub(crate) fn may_provide(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        if ["weir", "rpc.", "$"].iter().any(|own| service.starts_with(own)) {
            return Err(Error::params("names of services do not begin with weir, rpc. or $"));
        }
        self.change()
    }

    /// Also validates the name of the consumer: `[A-Za-z0-9._:-]{1,128}`.
    pub(crate) fn may_consume(&self, consumer: &str) -> Result<Permit<'_>> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if consumer.is_empty() || consumer.len() > MAX_CONSUMER || !consumer.bytes().all(legal) {
            return Err(Error::params("a consumer's name is 1 to 128 of A-Z a-z 0-9 . _ : -"));
        }
        self.change()
    }

    /// To be a presence member of a channel.
    pub(crate) fn may_enter(&self, _channel: &Channel) -> Result<Permit<'_>> {
        self.change()
    }

    /// To open a session that other clients see, or through which this client can write.
    pub(crate) fn may_connect(&self) -> Result<Permit<'_>> {
        self.change()
    }

    /// To list, trim and delete channels and consumers, and to see those of other clients.
    pub(crate) fn may_administer(&self) -> Result<Permit<'_>> {
        self.permit()
    }

    /// Permits what changes something, unless this is a page that may only read.
    fn change(&self) -> Result<Permit<'_>> {
        match self.read_only {
            true => Err(foreign_page()),
            false => self.permit(),
        }
    }

    fn permit(&self) -> Result<Permit<'_>> {
        Ok(Permit { subject: self.subject() })
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

    #[test]
    fn reserved_and_malformed_names_are_rejected() {
        let identity = Identity::anonymous();
        let services = Channel::parse("$services").unwrap();
        assert_eq!(identity.may_publish(&services).unwrap_err().code(), Code::Forbidden);
        assert!(identity.may_subscribe(&services).is_ok());
        for bad in ["weir", "weir/x", "rpc.x", "$x", "", "a\nb"] {
            assert_eq!(identity.may_provide(bad).unwrap_err().code(), Code::InvalidParams, "{bad:?}");
        }
        assert!(identity.may_call("weir").is_ok());
        for bad in ["", "a/b", "é", "a b", &"x".repeat(129)] {
            assert_eq!(identity.may_consume(bad).unwrap_err().code(), Code::InvalidParams, "{bad:?}");
        }
        assert!(identity.may_consume("batch-1:a.b_C").is_ok());
    }

    #[test]
    fn a_page_of_another_origin_may_only_read() {
        let (page, channel) = (Identity::read_only(), Channel::parse("a").unwrap());
        assert!(page.may_subscribe(&channel).is_ok());
        for permit in [
            page.may_publish(&channel),
            page.may_consume("n"),
            page.may_call("s"),
            page.may_provide("s"),
            page.may_enter(&channel),
            page.may_connect(),
        ] {
            assert_eq!(permit.unwrap_err().code(), Code::Forbidden);
        }
    }
}
