//! [`Identity`], the client of a request, and [`Permit`], the proof that it may do something.
//!
//! There are no credentials yet: every client is anonymous and may do everything, which is why weir listens on loopback
//! only unless configured otherwise.

use crate::{
    channel::{Channel, check_label},
    error::{Error, Result},
};

/// Longest name of a consumer, in bytes.
pub(crate) const MAX_CONSUMER: usize = 128;

/// The client of a request or connection. Cheap to clone; a transport takes it at the upgrade and keeps it.
#[derive(Clone, Debug, Default)]
pub struct Identity(());

/// Proof that an [`Identity`] may do something. Code that acts for a client takes its subject from here.
#[derive(Clone, Copy, Debug)]
#[must_use = "a check whose permit is not used is in the wrong place"]
pub(crate) struct Permit<'a> {
    subject: &'a str,
}

impl Identity {
    /// A client without credentials.
    pub(crate) fn anonymous() -> Self {
        Identity(())
    }

    /// Name of the identity, the scope of its idempotency keys. `""` is anonymous.
    pub(crate) fn subject(&self) -> &str {
        ""
    }

    /// Rejects reserved channels (`$…`) as `forbidden`.
    pub(crate) fn may_publish(&self, channel: &Channel) -> Result<Permit<'_>> {
        channel.writable()?;
        self.permit()
    }

    pub(crate) fn may_subscribe(&self, _channel: &Channel) -> Result<Permit<'_>> {
        self.permit()
    }

    /// Also validates the name of the service.
    pub(crate) fn may_call(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        self.permit()
    }

    /// Also validates the name of the service, and rejects the reserved names `weir…`, `rpc.…` and `$…`.
    pub(crate) fn may_provide(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        if ["weir", "rpc.", "$"].iter().any(|own| service.starts_with(own)) {
            return Err(Error::params("names of services do not begin with weir, rpc. or $"));
        }
        self.permit()
    }

    /// Also validates the name of the consumer: `[A-Za-z0-9._:-]{1,128}`.
    pub(crate) fn may_consume(&self, consumer: &str) -> Result<Permit<'_>> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if consumer.is_empty() || consumer.len() > MAX_CONSUMER || !consumer.bytes().all(legal) {
            return Err(Error::params("a consumer's name is 1 to 128 of A-Z a-z 0-9 . _ : -"));
        }
        self.permit()
    }

    /// To list, trim and delete channels and consumers, and to see those of other clients.
    pub(crate) fn may_administer(&self) -> Result<Permit<'_>> {
        self.permit()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

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
}
