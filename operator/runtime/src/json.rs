//! How much there is in JSON text, told before it is read: a value of two bytes may take some hundred as an object.

/// What was seen of a text so far, which may come in pieces.
///
/// Text that is no JSON is counted as well, up to where it ceases to be; a parser gets no further.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Values, those in values among them. Each but the outermost follows a comma or what opens a list or an object.
    pub values: usize,
    /// Lists and objects of the third level: the items of an API server's lists.
    pub items: usize,
    depth: usize,
    quoted: bool,
    escaped: bool,
}

impl Seen {
    /// All of a text.
    pub fn of(text: &str) -> Self {
        let mut seen = Self::default();
        text.bytes().for_each(|byte| seen.byte(byte));
        seen
    }

    /// One more byte.
    pub fn byte(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = self.quoted,
            b'"' => self.quoted = !self.quoted,
            _ if self.quoted => {}
            b'{' | b'[' => {
                self.depth += 1;
                self.values += 1;
                self.items += usize::from(self.depth == 3);
            }
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b',' => self.values += 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_values_where_it_has_no_strings() {
        assert_eq!(Seen::of(r#"{"a":[1,2],"b{[,\\":"\",","c":"\\\\","d":{}}"#).values, 7);
        assert_eq!(Seen::of("").values, 0);
    }

    #[test]
    fn json_has_items_on_the_third_level() {
        assert_eq!(
            Seen::of(r#"{"items":[{},[{}],{"a":[{"b":{}}]}],"metadata":{"c":"{"}}"#).items,
            3
        );
        assert_eq!(Seen::of("[[[]],[[],[]]]").items, 3);
    }
}
