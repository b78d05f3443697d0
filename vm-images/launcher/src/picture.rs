//! A picture of the screen becomes a PNG. Pure: bytes in, bytes out.
//!
//! qemu chooses every byte that comes in, and so may the tenant: the header is read up to a length, sizes are looked at
//! before anything is allocated by them, rows are converted one by one, and what comes out has a bound too.

use std::io::{self, BufRead, BufReader, Read, Write};

use kubernest_domain::control::SCREENSHOT_BYTES;
use png::{BitDepth, ColorType, Encoder, EncodingError};

/// Most pixels of a side; qemu's VGA has 16 MiB for all of them.
const SIDE: u32 = 16_384;
/// First bytes of a PNG (RFC 2083, section 3.1).
const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Most bytes before a pixmap's pixels: qemu writes about 15.
const HEADER: u64 = 64;
/// Bytes of a pixel: red, green, blue.
const PIXEL: usize = 3;

/// Why there is no PNG.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// It broke off.
    #[error("reading the picture")]
    Read(#[source] io::Error),
    /// Neither a PNG nor a binary portable pixmap of 8 bits a colour (ppm(5)).
    #[error("the picture is neither a PNG nor a portable pixmap")]
    Kind,
    /// No screen has this size.
    #[error("the picture has {width} × {height} pixels: a side has 1 to {SIDE}")]
    Size {
        /// Pixels of a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// More than anybody passes on.
    #[error("the picture has more than {SCREENSHOT_BYTES} bytes")]
    Large,
    /// The encoder.
    #[error("writing the PNG")]
    Encode(#[source] EncodingError),
}

/// The PNG of what qemu gives: a PNG or a pixmap.
///
/// # Errors
/// [`PictureError`].
pub fn to_png(from: impl Read) -> Result<Vec<u8>, PictureError> {
    within(SCREENSHOT_BYTES, from)
}

fn within(most: u64, from: impl Read) -> Result<Vec<u8>, PictureError> {
    let mut from = BufReader::new(from);
    if from.fill_buf().map_err(PictureError::Read)?.starts_with(b"P6") {
        return convert(most, from);
    }
    let mut png = Vec::new();
    from.take(most + 1).read_to_end(&mut png).map_err(PictureError::Read)?;
    if !png.starts_with(SIGNATURE) {
        return Err(PictureError::Kind);
    }
    match png.len() as u64 <= most {
        true => Ok(png),
        false => Err(PictureError::Large),
    }
}

fn convert(most: u64, mut from: impl BufRead) -> Result<Vec<u8>, PictureError> {
    let (width, height) = size(&mut from)?;
    let mut png = Bounded {
        most,
        bytes: Vec::new(),
        is_full: false,
    };
    let converted = write(&mut png, from, width, height);
    match png.is_full {
        true => Err(PictureError::Large),
        false => converted.map(|()| png.bytes),
    }
}

fn write(png: &mut Bounded, mut pixmap: impl Read, width: u32, height: u32) -> Result<(), PictureError> {
    let mut encoder = Encoder::new(png, width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(PictureError::Encode)?;
    let mut pixels = writer.stream_writer().map_err(PictureError::Encode)?;
    let mut row = vec![0; width as usize * PIXEL];
    for _ in 0..height {
        pixmap.read_exact(&mut row).map_err(PictureError::Read)?;
        pixels
            .write_all(&row)
            .map_err(|error| PictureError::Encode(error.into()))?;
    }
    pixels.finish().map_err(PictureError::Encode)?;
    writer.finish().map_err(PictureError::Encode)
}

/// Width and height of a pixmap as qemu writes it: three lines, without comments.
fn size(from: &mut impl BufRead) -> Result<(u32, u32), PictureError> {
    let mut header = from.take(HEADER);
    let mut line = || {
        let mut line = String::new();
        header.read_line(&mut line).map_err(|_| PictureError::Kind)?;
        Ok(line)
    };
    let (kind, size, most) = (line()?, line()?, line()?);
    if kind.trim_end() != "P6" || most != "255\n" {
        return Err(PictureError::Kind);
    }
    let (width, height) = size.trim_end().split_once(' ').ok_or(PictureError::Kind)?;
    let [width, height] = [width, height].map(|side| side.parse().map_err(|_| PictureError::Kind));
    let (width, height) = (width?, height?);
    match (1..=SIDE).contains(&width) && (1..=SIDE).contains(&height) {
        true => Ok((width, height)),
        false => Err(PictureError::Size { width, height }),
    }
}

/// What is written, up to the bound.
struct Bounded {
    most: u64,
    bytes: Vec<u8>,
    is_full: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.bytes.len() + bytes.len()) as u64 > self.most {
            self.is_full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pixmap(width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
        let mut pixmap = format!("P6\n{width} {height}\n255\n").into_bytes();
        pixmap.extend_from_slice(pixels);
        pixmap
    }

    fn said(picture: &[u8]) -> String {
        to_png(picture).unwrap_err().to_string()
    }

    #[test]
    fn picture_of_a_pixmap_has_its_pixels() {
        let pixels = [255, 0, 0, 0, 255, 0, 0, 0, 255, 1, 2, 3, 4, 5, 6, 7, 8, 9];
        let png = to_png(&pixmap(3, 2, &pixels)[..]).unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(png)).read_info().unwrap();
        let mut decoded = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut decoded).unwrap();
        assert_eq!((info.width, info.height, &decoded[..]), (3, 2, &pixels[..]));
    }

    #[test]
    fn picture_that_is_a_png_stays_as_it_is() {
        let png = to_png(&pixmap(1, 1, &[0; 3])[..]).unwrap();
        assert_eq!(to_png(&png[..]).unwrap(), png);
    }

    #[test]
    fn picture_sizes_are_looked_at_before_anything_is_allocated() {
        for (width, height) in [(0, 1), (1, 0), (SIDE + 1, 1), (u32::MAX, u32::MAX)] {
            assert!(
                said(&pixmap(width, height, b"")).contains("pixels"),
                "{width} × {height}"
            );
        }
        assert_eq!(said(&pixmap(SIDE, SIDE, &[0; 100])), "reading the picture");
    }

    #[test]
    fn picture_of_another_kind_is_refused() {
        for other in [
            "",
            "P5\n1 1\n255\nxxx",
            "P6\n1 1\n65535\nxxxxxx",
            "P6\n-1 1\n255\nxxx",
            "P6\n# who\n1 1\n255\nxxx",
            "P6\n99999999999 1\n255\n",
            "GIF89a",
        ] {
            assert!(said(other.as_bytes()).contains("neither"), "{other}");
        }
        let endless = io::Read::chain(&b"P6\n"[..], io::repeat(b'1'));
        assert!(matches!(to_png(endless), Err(PictureError::Kind)));
    }

    #[test]
    fn picture_without_end_is_cut() {
        let most = 1 << 16;
        let endless = io::Read::chain(SIGNATURE, io::repeat(0));
        assert!(matches!(within(most, endless), Err(PictureError::Large)));
        // Bytes without a pattern (xorshift), which no compression makes fewer.
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take(most as usize)
        .flatten()
        .collect();
        let header = pixmap(SIDE, SIDE, b"");
        let endless = io::Read::chain(&header[..], &noise[..]).chain(io::repeat(0));
        assert!(matches!(within(most, endless), Err(PictureError::Large)));
    }
}
