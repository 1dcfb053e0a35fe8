//! `weir key` and `weir token`: credentials, made and checked without a node.

use tokio::io::AsyncReadExt as _;

use super::args::{KeyCommand, TokenCommand};
use crate::{
    auth::{Authenticator, KeyDigest, TokenRequest, generate_key},
    config::Config,
    terminal::{Failure, Output, note},
};

pub(super) async fn key(command: KeyCommand, out: &mut Output) -> Result<(), Failure> {
    match command {
        KeyCommand::New { name, roles, expires } => {
            let key = generate_key();
            let hash = KeyDigest::of(&key).to_string();
            let quoted = |text: &str| serde_json::Value::from(text).to_string();
            let list: Vec<_> = roles.iter().map(|role| quoted(role)).collect();
            note(format_args!("weir stores the hash only. Add this to the configuration file:"));
            eprintln!("[[auth.keys]]\nname = {}\nhash = \"{hash}\"\nroles = [{}]", quoted(&name), list.join(", "));
            if let Some(expires) = expires {
                eprintln!("expires = {}", quoted(&expires));
            }
            let made = serde_json::json!({ "name": name, "key": key, "hash": hash });
            out.line(&made.to_string())
        }
        KeyCommand::Hash => {
            let hash = KeyDigest::of(&credential().await?).to_string();
            out.line(&serde_json::json!({ "hash": hash }).to_string())
        }
    }
}

pub(super) async fn token(command: TokenCommand, config: &Config, out: &mut Output) -> Result<(), Failure> {
    let problems = |problems: Vec<(String, String)>| {
        let lines: Vec<_> = problems.iter().map(|(key, reason)| format!("{key}: {reason}")).collect();
        Failure::Usage(lines.join("\n"))
    };
    let auth = Authenticator::new(&config.auth).map_err(problems)?;
    if !auth.is_on() {
        return Err(Failure::Usage("authentication is off: there is neither a key nor an issuer of tokens; pass --config FILE or set WEIR_CONFIG".into()));
    }
    let _key_sets = auth.start();
    match command {
        TokenCommand::Make { sub, grants, roles, ttl, .. } => {
            let request = TokenRequest { subject: &sub, grants: &grants, roles: &roles, ttl };
            let (token, expires) = request.sign(&config.auth.jwt).map_err(Failure::Usage)?;
            out.line(&serde_json::json!({ "token": token, "subject": sub, "expires": expires }).to_string())
        }
        TokenCommand::Check { .. } => {
            let checked = auth.verify(&credential().await?).await;
            let answer = match &checked {
                Ok(identity) => serde_json::json!({
                    "valid": true,
                    "subject": identity.subject(),
                    "expires": identity.expires(),
                }),
                Err(error) => serde_json::json!({
                    "valid": false,
                    "code": error.code().as_str(),
                    "detail": error.detail(),
                }),
            };
            out.line(&answer.to_string())?;
            checked.map(drop).map_err(|_| Failure::Rejected("the credential is not valid".into()))
        }
        TokenCommand::Explain { verb, name, .. } => {
            let explained = auth.explain(&credential().await?, &verb, &name).await;
            let (allowed, answer) = explained.map_err(|error| Failure::Rejected(error.detail().to_owned()))?;
            out.line(&answer.to_string())?;
            if allowed { Ok(()) } else { Err(Failure::Rejected("not permitted".into())) }
        }
    }
}

/// The credential on standard input, or in `WEIR_TOKEN`: bare, or as `weir key new` and `weir token make` print it.
async fn credential() -> Result<String, Failure> {
    let text = text().await?;
    let printed = serde_json::from_str::<serde_json::Value>(&text).unwrap_or_default();
    let member = printed.get("token").or_else(|| printed.get("key")).and_then(serde_json::Value::as_str);
    Ok(member.map_or(text.clone(), str::to_owned))
}

async fn text() -> Result<String, Failure> {
    if let Ok(token) = std::env::var("WEIR_TOKEN") {
        return Ok(token);
    }
    let mut text = String::new();
    // A credential has at most 8 KiB.
    let read = tokio::io::stdin().take(64 * 1024).read_to_string(&mut text).await;
    read.map_err(|error| Failure::Failed(format!("standard input: {error}")))?;
    let text = text.trim();
    if text.is_empty() {
        Err(Failure::Usage("no credential on standard input, nor in WEIR_TOKEN".into()))
    } else {
        Ok(text.to_owned())
    }
}
