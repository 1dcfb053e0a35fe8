//! Who asks, and what they may do: an [`Identity`] is asked, a [`Permit`] is the answer that handlers pass on.
//!
//! Credentials are an issue of their own. Until then everyone is anonymous and may do everything, which is why weir
//! listens on loopback only unless told otherwise.

use crate::{
    channel::{Channel, check_label},
    error::{Error, Result},
};

/// Longest name of a consumer, in bytes.
pub const MAX_CONSUMER: usize = 128;

/// Who a request or connection is. Cheap to clone; a transport takes it at the upgrade and keeps it.
#[derive(Clone, Debug, Default)]
pub struct Identity(());

/// Proof that an [`Identity`] was asked and agreed. What acts on a client's behalf takes its subject from here.
#[derive(Clone, Copy, Debug)]
#[must_use = "a permit that nobody needs is a check in the wrong place"]
pub struct Permit<'a> {
    subject: &'a str,
}

impl Identity {
    /// Nobody in particular.
    pub fn anonymous() -> Self {
        Identity(())
    }

    /// The name under which this identity acts: the scope of its idempotency keys. `""` is anonymous.
    pub fn subject(&self) -> &str {
        ""
    }

    /// Refuses channels that nobody may write to (`$…`) as `forbidden`.
    pub fn may_publish(&self, channel: &Channel) -> Result<Permit<'_>> {
        channel.writable()?;
        self.permit()
    }

    pub fn may_subscribe(&self, _channel: &Channel) -> Result<Permit<'_>> {
        self.permit()
    }

    /// `service` as a client wrote it: checked as a name too.
    pub fn may_call(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        self.permit()
    }

    /// Refuses the names that are weir's own: `weir…`, `rpc.…`, `$…`.
    pub fn may_provide(&self, service: &str) -> Result<Permit<'_>> {
        check_label("service", service)?;
        if ["weir", "rpc.", "$"].iter().any(|own| service.starts_with(own)) {
            return Err(Error::params("names of services do not begin with weir, rpc. or $"));
        }
        self.permit()
    }

    /// `consumer` as a client wrote it: `[A-Za-z0-9._:-]{1,128}`.
    pub fn may_consume(&self, consumer: &str) -> Result<Permit<'_>> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if consumer.is_empty() || consumer.len() > MAX_CONSUMER || !consumer.bytes().all(legal) {
            return Err(Error::params("a consumer's name is 1 to 128 of A-Z a-z 0-9 . _ : -"));
        }
        self.permit()
    }

    /// Lists, trims, deletes and sees what is not their own.
    pub fn may_administer(&self) -> Result<Permit<'_>> {
        self.permit()
    }

    fn permit(&self) -> Result<Permit<'_>> {
        Ok(Permit { subject: self.subject() })
    }
}

impl<'a> Permit<'a> {
    pub fn subject(self) -> &'a str {
        self.subject
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn names_that_are_not_a_client_s() {
        let anyone = Identity::anonymous();
        let services = Channel::parse("$services").unwrap();
        assert_eq!(anyone.may_publish(&services).unwrap_err().code(), Code::Forbidden);
        assert!(anyone.may_subscribe(&services).is_ok());
        for bad in ["weir", "weir/x", "rpc.x", "$x", "", "a\nb"] {
            assert_eq!(anyone.may_provide(bad).unwrap_err().code(), Code::InvalidParams, "{bad:?}");
        }
        assert!(anyone.may_call("weir").is_ok());
        for bad in ["", "a/b", "é", "a b", &"x".repeat(129)] {
            assert_eq!(anyone.may_consume(bad).unwrap_err().code(), Code::InvalidParams, "{bad:?}");
        }
        assert!(anyone.may_consume("batch-1:a.b_C").is_ok());
    }
}
