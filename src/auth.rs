//! Authentication and permissions: from the credentials of a request to an [`Identity`], and from there to a [`Permit`].

mod authenticator;
mod grant;
mod identity;
mod jwks;
mod jwt;
mod key;

pub use identity::Identity;
pub(crate) use {
    authenticator::{AuthProblems, Authenticator},
    identity::{AdminOperation, MAX_CONSUMER, foreign_page},
    jwt::TokenRequest,
    key::{KeyDigest, generate as generate_key},
};
