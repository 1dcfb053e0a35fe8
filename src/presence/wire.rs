//! What nodes tell each other of their members, as bytes.
//!
//! ```text
//! mail    version:1 · note*                              little endian
//! note    tag:1 · length:4 · payload, by tag:
//!   1 all        all that the sender holds follows
//!   2 held       name · about                            it holds this member, as it is now
//!   3 gone       name                                    and this one no longer
//!   4 that       is all that it holds
//!   5 …8         the same of what was announced; only from who announces
//!   9 upto       position · channel                      so far: what one event announced, after the members of it
//! name    length:1 · channel · length:1 · client
//! about   since:8 · brief:2 · text                       to the end of the note
//! position  epoch, six characters of it, or 0 · - · offset
//! ```

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};

use super::{about::About, book::Name};
use crate::{channel::Channel, position::Position};

/// What this node writes, and the highest that it reads. A note with an unknown tag is left out.
const VERSION: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    All,
    Held(Name, About),
    Gone(Name),
    That,
    AllTold,
    Told(Name, About),
    Untold(Name),
    ThatTold,
    Upto(Channel, Position),
}

/// Notes that become mails of at most about `most` bytes each.
pub struct Mails {
    most: usize,
    full: Vec<Bytes>,
    mail: Vec<u8>,
}

impl Mails {
    pub fn new(most: usize) -> Self {
        Mails { most, full: Vec::new(), mail: vec![VERSION] }
    }

    pub fn all(&mut self) {
        self.note(1, |_| {});
    }

    pub fn held(&mut self, name: (&Channel, &str), about: &About) {
        self.note(2, |out| {
            put_name(name, out);
            put_about(about, out);
        });
    }

    pub fn gone(&mut self, name: (&Channel, &str)) {
        self.note(3, |out| put_name(name, out));
    }

    pub fn that(&mut self) {
        self.note(4, |_| {});
    }

    pub fn all_told(&mut self) {
        self.note(5, |_| {});
    }

    pub fn told(&mut self, name: (&Channel, &str), about: Option<&About>) {
        self.note(if about.is_some() { 6 } else { 7 }, |out| {
            put_name(name, out);
            if let Some(about) = about {
                put_about(about, out);
            }
        });
    }

    pub fn that_told(&mut self) {
        self.note(8, |_| {});
    }

    pub fn upto(&mut self, channel: &Channel, at: Position) {
        self.note(9, |out| {
            put_text(&at.to_string(), out);
            put_text(channel.as_str(), out);
        });
    }

    fn note(&mut self, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
        if self.mail.len() >= self.most {
            self.full.push(std::mem::replace(&mut self.mail, vec![VERSION]).into());
        }
        self.mail.push(tag);
        let at = self.mail.len();
        self.mail.extend_from_slice(&[0; 4]);
        write(&mut self.mail);
        let length = (self.mail.len() - at - 4) as u32;
        self.mail[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// The mails, in order; none if there was nothing to write.
    pub fn finish(mut self) -> Vec<Bytes> {
        if self.mail.len() > 1 {
            self.full.push(self.mail.into());
        }
        self.full
    }
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    // Names of channels have at most 255 bytes, those of clients 128.
    out.put_u8(text.len() as u8);
    out.put_slice(text.as_bytes());
}

fn put_name((channel, client): (&Channel, &str), out: &mut Vec<u8>) {
    put_text(channel.as_str(), out);
    put_text(client, out);
}

fn put_about(about: &About, out: &mut Vec<u8>) {
    out.put_u64_le(about.since);
    out.put_u16_le(about.brief);
    out.put_slice(about.text.as_bytes());
}

/// The notes of a mail that can be read, in order.
pub fn read(mail: &[u8]) -> Vec<Note> {
    let mut notes = Vec::new();
    let [VERSION, rest @ ..] = mail else { return notes };
    let mut rest = rest;
    while rest.len() >= 5 {
        let tag = rest.get_u8();
        let length = rest.get_u32_le() as usize;
        if rest.len() < length {
            break;
        }
        notes.extend(note(tag, &rest[..length]));
        rest.advance(length);
    }
    notes
}

fn note(tag: u8, mut from: &[u8]) -> Option<Note> {
    let from = &mut from;
    Some(match tag {
        1 => Note::All,
        2 => Note::Held(name(from)?, about(from)?),
        3 => Note::Gone(name(from)?),
        4 => Note::That,
        5 => Note::AllTold,
        6 => Note::Told(name(from)?, about(from)?),
        7 => Note::Untold(name(from)?),
        8 => Note::ThatTold,
        9 => {
            let at = text(from)?.parse().ok()?;
            Note::Upto(Channel::parse(text(from)?).ok()?, at)
        }
        _ => return None,
    })
}

fn text<'a>(from: &mut &'a [u8]) -> Option<&'a str> {
    let (length, rest) = from.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*length))?;
    *from = rest;
    std::str::from_utf8(text).ok()
}

fn name(from: &mut &[u8]) -> Option<Name> {
    Some((Channel::parse(text(from)?).ok()?, Arc::from(text(from)?)))
}

fn about(from: &mut &[u8]) -> Option<About> {
    if from.len() < 10 {
        return None;
    }
    let (since, brief) = (from.get_u64_le(), from.get_u16_le());
    Some(About { text: std::str::from_utf8(from).ok()?.into(), brief, since })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_the_way_in_mails_of_any_size() {
        let name = |n: usize| (Channel::parse(&format!("room {n}")).unwrap(), Arc::<str>::from("é"));
        let about = About { text: ",\"subject\":\"\"".into(), brief: 13, since: 7 };
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 42 };
        for most in [1, 40, 100, 100_000] {
            let mut mails = Mails::new(most);
            let mut notes = vec![Note::All];
            mails.all();
            for n in 0..9 {
                let (channel, client) = name(n);
                mails.held((&channel, &client), &about);
                mails.gone((&channel, &client));
                mails.told((&channel, &client), Some(&about));
                mails.told((&channel, &client), None);
                mails.upto(&channel, at);
                notes.extend([
                    Note::Held(name(n), about.clone()),
                    Note::Gone(name(n)),
                    Note::Told(name(n), about.clone()),
                    Note::Untold(name(n)),
                    Note::Upto(name(n).0, at),
                ]);
            }
            mails.that();
            mails.all_told();
            mails.that_told();
            notes.extend([Note::That, Note::AllTold, Note::ThatTold]);
            let mails = mails.finish();
            assert!(mails.iter().all(|mail| mail.len() < most + 100));
            assert_eq!(mails.iter().flat_map(|mail| read(mail)).collect::<Vec<_>>(), notes);
        }
        assert!(Mails::new(100).finish().is_empty());
    }

    #[test]
    fn what_is_garbled_or_of_a_later_version_is_left_out() {
        let mut mails = Mails::new(1000);
        mails.gone((&Channel::parse("a").unwrap(), "c"));
        mails.that();
        let mail = mails.finish().remove(0);
        assert_eq!(read(&mail).len(), 2);
        for cut in 0..mail.len() {
            assert!(read(&mail[..cut]).len() < 2);
        }
        let mut later = mail.to_vec();
        later[1] = 99;
        assert_eq!(read(&later), [Note::That]);
        later[0] = 2;
        assert_eq!(read(&later), []);
        for _ in 0..10_000 {
            let noise: Vec<u8> = std::iter::once(1).chain((0..30).map(|_| fastrand::u8(..10))).collect();
            read(&noise);
        }
    }
}
