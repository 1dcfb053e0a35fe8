//! JSON Web Tokens: valid ones, and every way to be invalid.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use weir::config::{AuthSection, Config, JwtSection};

use super::{bearer, role, texts};
use crate::support::{
    Weir,
    command::{finish, weir_command},
    eventually, weir,
};

const SECRET: &str = "a-shared-secret-of-at-least-32-bytes";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Valid claims with these changes; null removes a claim.
fn claims(changes: Value) -> Value {
    let mut claims = json!({
        "iss": "weir", "aud": "weir", "sub": "ann", "iat": now(), "exp": now() + 600,
        "weir": { "subscribe": ["news.*", "user.{sub}"] },
    });
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        } else {
            claims[name] = value.clone();
        }
    }
    claims
}

fn sign_with(header: &Value, claims: &str, secret: &str) -> String {
    let signed = format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims));
    let key = EncodingKey::from_secret(secret.as_bytes()).unwrap();
    let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{signed}.{signature}")
}

fn sign(claims: &Value) -> String {
    sign_with(&json!({ "alg": "HS256", "typ": "JWT" }), &claims.to_string(), SECRET)
}

fn with_secret(config: &mut Config) {
    config.auth = AuthSection {
        jwt: JwtSection { secret: SECRET.into(), ..JwtSection::default() },
        roles: vec![role("staff", |role| role.publish = texts(&["news.*"]))],
        ..AuthSection::default()
    };
}

/// The code of reading `channel` with a token, or `""`.
async fn read(weir: &Weir, token: &str, channel: &str) -> String {
    let reply = bearer(weir.request("GET", format!("/v1/events?channel={channel}")), token).await;
    if reply.status == 200 { String::new() } else { reply.json()["code"].as_str().unwrap().to_owned() }
}

#[tokio::test]
async fn a_token_permits_what_its_claim_says() {
    let weir = weir().with(with_secret).await;
    let token = sign(&claims(json!({})));
    for (channel, code) in [("news.eu", ""), ("user.ann", ""), ("user.bob", "forbidden"), ("$services", "forbidden")] {
        assert_eq!(read(&weir, &token, channel).await, code, "{channel}");
        // Once more, from the cache.
        assert_eq!(read(&weir, &token, channel).await, code, "{channel}");
    }
    let staff = sign(&claims(json!({ "weir": { "roles": ["staff"] } })));
    bearer(weir.request("POST", "/v1/events?channel=news.eu").body("1"), &staff).await.expect(201);
    assert_eq!(read(&weir, &staff, "news.eu").await, "forbidden");
}

#[tokio::test]
async fn every_flaw_of_a_token_is_rejected() {
    let weir = weir().with(with_secret).await;
    let flaws = [
        ("expired", json!({ "exp": now() - 100, "iat": now() - 200 }), "token_expired"),
        ("no exp", json!({ "exp": null }), "unauthorized"),
        ("exp is text", json!({ "exp": "later" }), "unauthorized"),
        ("no iat", json!({ "iat": null }), "unauthorized"),
        ("iat ahead", json!({ "iat": now() + 100 }), "unauthorized"),
        ("nbf ahead", json!({ "nbf": now() + 100 }), "unauthorized"),
        ("nbf is text", json!({ "nbf": "now" }), "unauthorized"),
        ("lives too long", json!({ "exp": now() + 90_000 }), "unauthorized"),
        ("other issuer", json!({ "iss": "other" }), "unauthorized"),
        ("no issuer", json!({ "iss": null }), "unauthorized"),
        ("other audience", json!({ "aud": "other" }), "unauthorized"),
        ("no audience", json!({ "aud": null }), "unauthorized"),
        ("audiences without weir", json!({ "aud": ["a", "b"] }), "unauthorized"),
        ("no subject", json!({ "sub": null }), "unauthorized"),
        ("empty subject", json!({ "sub": "" }), "unauthorized"),
        ("subject of a key", json!({ "sub": "key:admin" }), "unauthorized"),
        ("subject with a line break", json!({ "sub": "a\nb" }), "unauthorized"),
        ("long subject", json!({ "sub": "a".repeat(129) }), "unauthorized"),
        ("bound to a key", json!({ "cnf": { "jkt": "x" } }), "unauthorized"),
        ("unknown permission", json!({ "weir": { "read": ["*"] } }), "unauthorized"),
        ("malformed pattern", json!({ "weir": { "subscribe": ["*", "{x}"] } }), "unauthorized"),
        ("unknown role", json!({ "weir": { "roles": ["boss"] } }), "unauthorized"),
        ("claim is text", json!({ "weir": "admin" }), "unauthorized"),
        (
            "too many labels",
            json!({ "weir": { "labels": (0..9).map(|n| (n.to_string(), json!("x"))).collect::<serde_json::Map<_, _>>() } }),
            "unauthorized",
        ),
    ];
    for (flaw, changes, code) in flaws {
        assert_eq!(read(&weir, &sign(&claims(changes)), "news.eu").await, code, "{flaw}");
    }
    let good = claims(json!({})).to_string();
    for (flaw, header) in [
        ("no signature", json!({ "alg": "none" })),
        ("algorithm that is not configured", json!({ "alg": "HS512" })),
        ("critical extension", json!({ "alg": "HS256", "crit": ["x"], "x": 1 })),
        ("unencoded payload", json!({ "alg": "HS256", "b64": false })),
        ("other type", json!({ "alg": "HS256", "typ": "secevent+jwt" })),
    ] {
        assert_eq!(read(&weir, &sign_with(&header, &good, SECRET), "news.eu").await, "unauthorized", "{flaw}");
    }
    let header = json!({ "alg": "HS256" });
    let other = sign_with(&header, &good, "another-secret-of-at-least-32-bytes!");
    assert_eq!(read(&weir, &other, "news.eu").await, "unauthorized");
    let repeated = good.replacen('{', "{\"sub\":\"bob\",", 1);
    assert_eq!(read(&weir, &sign_with(&header, &repeated, SECRET), "news.eu").await, "unauthorized");
    let unsigned = sign(&claims(json!({})));
    let unsigned = &unsigned[..=unsigned.rfind('.').unwrap()];
    assert_eq!(read(&weir, unsigned, "news.eu").await, "unauthorized");
    let good = sign(&claims(json!({})));
    assert_eq!(read(&weir, &good, "news.eu").await, "");
    assert_eq!(read(&weir, &sign(&claims(json!({ "aud": ["a", "weir"] }))), "news.eu").await, "");
}

#[tokio::test]
async fn a_secret_is_rotated_without_a_gap() {
    let weir = weir()
        .with(|config| {
            with_secret(config);
            config.auth.jwt.secret_before = SECRET.into();
            config.auth.jwt.secret = "the-next-secret-of-at-least-32-bytes".into();
        })
        .await;
    let header = json!({ "alg": "HS256" });
    let claims = claims(json!({})).to_string();
    for secret in [SECRET, "the-next-secret-of-at-least-32-bytes"] {
        assert_eq!(read(&weir, &sign_with(&header, &claims, secret), "news.eu").await, "");
    }
}

/// A key pair on the curve P-256, by openssl.
fn key_pair(folder: &std::path::Path, name: &str) -> (EncodingKey, Value, String) {
    let run = |args: &[&str]| {
        let done = std::process::Command::new("openssl").args(args).current_dir(folder).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        done.stdout
    };
    let (private, pkcs8, public) = (format!("{name}.pem"), format!("{name}.p8"), format!("{name}.pub"));
    run(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &private]);
    run(&["pkcs8", "-topk8", "-nocrypt", "-in", &private, "-out", &pkcs8]);
    run(&["ec", "-in", &private, "-pubout", "-out", &public]);
    let der = run(&["ec", "-in", &private, "-pubout", "-outform", "DER"]);
    // The point is the end of the structure: 4, x, y.
    let point = &der[der.len() - 64..];
    let jwk = json!({
        "kty": "EC", "crv": "P-256", "use": "sig", "kid": name,
        "x": BASE64URL.encode(&point[..32]), "y": BASE64URL.encode(&point[32..]),
    });
    let key = EncodingKey::from_ec_pem(&std::fs::read(folder.join(pkcs8)).unwrap()).unwrap();
    (key, jwk, std::fs::read_to_string(folder.join(public)).unwrap())
}

fn sign_es256(key: &EncodingKey, kid: Option<&str>) -> String {
    let header = Header { kid: kid.map(str::to_owned), ..Header::new(Algorithm::ES256) };
    jsonwebtoken::encode(&header, &claims(json!({})), key).unwrap()
}

fn folder(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("weir-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[tokio::test]
async fn a_public_key_verifies_and_is_no_shared_secret() {
    let folder = folder("public-key");
    let (key, _, pem) = key_pair(&folder, "one");
    let (other, _, _) = key_pair(&folder, "other");
    let weir =
        weir().with(|config| config.auth.jwt = JwtSection { public_key: pem.clone(), ..JwtSection::default() }).await;
    assert_eq!(read(&weir, &sign_es256(&key, None), "news.eu").await, "");
    assert_eq!(read(&weir, &sign_es256(&other, None), "news.eu").await, "unauthorized");
    let confused = sign_with(&json!({ "alg": "HS256" }), &claims(json!({})).to_string(), &pem);
    assert_eq!(read(&weir, &confused, "news.eu").await, "unauthorized");
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_key_set_is_fetched_again_for_a_new_key() {
    let folder = folder("key-set");
    let (first, first_jwk, _) = key_pair(&folder, "first");
    let (second, second_jwk, _) = key_pair(&folder, "second");
    let path = folder.join("jwks.json");
    let ignored = json!({ "kty": "oct", "kid": "second", "k": BASE64URL.encode(SECRET) });
    let publish = |keys: Vec<&Value>| std::fs::write(&path, json!({ "keys": keys }).to_string()).unwrap();
    publish(vec![&first_jwk, &ignored]);
    let weir = weir()
        .with(|config| {
            let (jwks, refresh) = (format!("file:{}", path.display()), std::time::Duration::from_secs(1));
            config.auth.jwt = JwtSection { jwks, refresh, ..JwtSection::default() };
        })
        .await;
    assert_eq!(read(&weir, &sign_es256(&first, Some("first")), "news.eu").await, "");
    assert_eq!(read(&weir, &sign_es256(&second, Some("first")), "news.eu").await, "unauthorized");
    publish(vec![&first_jwk, &second_jwk]);
    assert_eq!(read(&weir, &sign_es256(&second, Some("second")), "news.eu").await, "");
    // With two keys, a token names its key.
    assert_eq!(read(&weir, &sign_es256(&first, None), "news.eu").await, "unauthorized");
    // A token that was verified ends with its key.
    let token = sign_es256(&first, Some("first"));
    assert_eq!(read(&weir, &token, "news.eu").await, "");
    publish(vec![&second_jwk]);
    eventually("the withdrawn key verifies nothing", async || read(&weir, &token, "news.eu").await == "unauthorized")
        .await;
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn without_a_key_set_tokens_cannot_be_checked_now() {
    let weir = weir()
        .with(|config| {
            config.auth.jwt = JwtSection { jwks: "http://127.0.0.1:9/jwks.json".into(), ..JwtSection::default() };
        })
        .await;
    let folder = folder("no-key-set");
    let (key, _, _) = key_pair(&folder, "one");
    let reply = bearer(weir.request("GET", "/v1/events?channel=a"), &sign_es256(&key, None)).await;
    assert!(reply.header("retry-after").is_some());
    reply.expect_problem("auth_unavailable");
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn the_command_line_makes_checks_and_explains_credentials() {
    let run = async |args: &[&str], token: &str| {
        let mut command = weir_command();
        command.args(args).env("WEIR__AUTH__JWT__SECRET", SECRET).env("WEIR_TOKEN", token);
        finish(command).await
    };
    let made = run(&["token", "make", "--sub", "ann", "--grant", "subscribe=news.*"], "").await.ok();
    let token = made[0]["token"].as_str().unwrap().to_owned();
    let checked = run(&["token", "check"], &token).await.ok();
    assert_eq!((&checked[0]["valid"], &checked[0]["subject"]), (&json!(true), &json!("ann")));
    // As it is printed.
    assert_eq!(run(&["token", "check"], &made[0].to_string()).await.ok()[0]["subject"], "ann");
    let wrong = run(&["token", "check"], "a.b.c").await;
    wrong.fails(3, "not valid");
    assert_eq!(wrong.lines[0]["code"], "unauthorized");
    let explained = run(&["token", "explain", "subscribe", "news.eu"], &token).await.ok();
    assert_eq!(explained, [json!({ "allowed": true, "by": "the token: news.*" })]);
    let explained = run(&["token", "explain", "subscribe", "other"], &token).await;
    explained.fails(3, "not permitted");
    assert_eq!(explained.lines, [json!({ "allowed": false, "void": [] })]);
    let weir = weir().with(with_secret).await;
    assert_eq!(read(&weir, &token, "news.eu").await, "");
    let key = run(&["key", "new", "ci", "--role", "client"], "").await;
    assert!(key.notes.contains("[[auth.keys]]") && key.notes.contains("roles = [\"client\"]"), "{}", key.notes);
    let (key, hash) = (key.lines[0]["key"].as_str().unwrap(), key.lines[0]["hash"].as_str().unwrap());
    assert_eq!(super::hash(key), hash);
    assert_eq!(run(&["key", "hash"], key).await.ok(), [json!({ "hash": hash })]);
}

#[tokio::test]
async fn invalid_settings_are_reported_by_config_check() {
    let mut command = weir_command();
    command.args(["config", "check"]);
    command.env("WEIR__AUTH__KEY", "short").env("WEIR__AUTH__ANONYMOUS", "nobody");
    command.env("WEIR__AUTH__KEYS", "[{ name = \"ci\", hash = \"x\", roles = [\"boss\"], expires = \"soon\" }]");
    command.env("WEIR__AUTH__ROLES", "[{ name = \"r\", subscribe = [\"{x}\"], call = [\"orders\"] }]");
    command.env("WEIR__AUTH__JWT__SECRET", "short");
    let checked = finish(command).await;
    for text in [
        "auth.key: needs at least 32",
        "auth.anonymous: \"nobody\" is not a role",
        "auth.keys[0].hash: needs sha256:",
        "auth.keys[0].roles: \"boss\" is not a role",
        "auth.keys[0].expires: \"soon\" is not a time",
        "auth.roles[0].subscribe: ",
        "auth.roles[0].call: ",
        "auth.jwt.secret: needs at least 32 bytes",
    ] {
        checked.fails(2, text);
    }
}
