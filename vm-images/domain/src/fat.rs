//! Small FAT images from files in memory: cloud-init's NoCloud and Secrets as disks.
//!
//! FAT and not ISO 9660 because both cloud-init (label `cidata`) and every guest kernel read it, and the same files
//! always give the same bytes. Bounded: larger content is refused.

use std::io::{Cursor, Write};

use fatfs::{Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};

/// Most bytes of content in one image: a Secret holds at most 1 MiB.
pub const MAX_CONTENT: usize = 2 << 20;
/// Most files in one image.
const MAX_FILES: usize = 256;
/// Label that cloud-init looks for, in either case (its `DataSourceNoCloud`).
pub const CLOUD_INIT_LABEL: &str = "CIDATA";
/// Label that its `DataSourceConfigDrive` looks for.
pub const CONFIG_DRIVE_LABEL: &str = "config-2";
/// Sizes that sectors may have (Microsoft's FAT specification, 3.1).
const SECTOR: std::ops::RangeInclusive<u64> = 512..=4096;

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
pub enum FatError {
    /// More than [`MAX_CONTENT`] bytes or too many files.
    #[error("{files} files of {bytes} bytes are too many for one disk (at most 256 files of 2 MiB together)")]
    TooLarge {
        /// Number of files.
        files: usize,
        /// Bytes together.
        bytes: usize,
    },
    /// Not usable as a volume label.
    #[error("'{0}' is no volume label: 1 to 11 ASCII characters")]
    Label(String),
    /// FAT has no such sectors.
    #[error("sectors of {0} bytes: FAT has them of 512 to 4096 bytes, a power of two")]
    Sector(u64),
    /// Formatting memory.
    #[error("formatting the image")]
    Format(#[source] std::io::Error),
    /// Writing one file, for example because of its name.
    #[error("writing {name} into the image")]
    File {
        /// Name of the file.
        name: String,
        /// What was wrong.
        source: std::io::Error,
    },
}

/// The same bytes for the same files: no clock.
#[derive(Debug)]
struct NoClock;

impl TimeProvider for NoClock {
    fn get_current_date(&self) -> Date {
        Date {
            year: 2000,
            month: 1,
            day: 1,
        }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: self.get_current_date(),
            time: Time {
                hour: 0,
                min: 0,
                sec: 0,
                millis: 0,
            },
        }
    }
}

/// A label as FAT stores it: padded with blanks; none if it does not fit.
pub fn label(text: &str) -> Option<[u8; 11]> {
    let fits = (1..=11).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    fits.then(|| {
        let mut padded = [b' '; 11];
        padded[..text.len()].copy_from_slice(text.as_bytes());
        padded
    })
}

/// An image with these files, their names relative to its root, for a disk with sectors of so many bytes: kernels mount none
/// whose sectors are smaller than the disk's.
pub fn image(volume_label: &str, sector: u64, files: &[(String, Vec<u8>)]) -> Result<Vec<u8>, FatError> {
    let (Ok(bytes_per_sector), true) = (
        u16::try_from(sector),
        SECTOR.contains(&sector) && sector.is_power_of_two(),
    ) else {
        return Err(FatError::Sector(sector));
    };
    let cluster = usize::from(bytes_per_sector);
    let label = label(volume_label).ok_or_else(|| FatError::Label(volume_label.to_owned()))?;
    let bytes = files.iter().map(|(_, content)| content.len()).sum::<usize>();
    if files.len() > MAX_FILES || bytes > MAX_CONTENT {
        return Err(FatError::TooLarge {
            files: files.len(),
            bytes,
        });
    }
    // FAT16 has at least 4085 clusters (Microsoft's FAT specification, 3.5); each file may waste one.
    let clusters = 4200 + bytes / cluster + files.len();
    let mut disk = Cursor::new(vec![0; clusters.next_multiple_of(64) * cluster + (64 << 10)]);
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat16)
        .bytes_per_sector(bytes_per_sector)
        .bytes_per_cluster(u32::from(bytes_per_sector))
        .max_root_dir_entries(4096)
        .volume_id(0)
        .volume_label(label);
    fatfs::format_volume(&mut disk, options).map_err(FatError::Format)?;
    disk.set_position(0);
    {
        let fs = FileSystem::new(&mut disk, FsOptions::new().time_provider(&NoClock)).map_err(FatError::Format)?;
        let root = fs.root_dir();
        for (name, content) in files {
            let mut folders = name.match_indices('/').map(|(end, _)| &name[..end]);
            folders
                .try_for_each(|folder| root.create_dir(folder).map(drop))
                .and_then(|()| root.create_file(name))
                .and_then(|mut file| file.write_all(content).and_then(|()| file.flush()))
                .map_err(|source| FatError::File {
                    name: name.clone(),
                    source,
                })?;
        }
        drop(root);
        fs.unmount().map_err(FatError::Format)?;
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_fat_image_is_read_back_and_reproducible() {
        let files = vec![
            ("user-data".to_owned(), b"#cloud-config\n".to_vec()),
            ("meta-data".to_owned(), vec![b'x'; 300_000]),
            ("a rather long name of a key.json".to_owned(), Vec::new()),
            ("openstack/latest/user_data".to_owned(), b"x".to_vec()),
            ("openstack/latest/meta_data.json".to_owned(), b"{}".to_vec()),
        ];
        for sector in [512, 2048, 4096] {
            let image = image("cidata", sector, &files).unwrap();
            assert_eq!(image, super::image("cidata", sector, &files).unwrap());
            assert_eq!(
                u64::from(u16::from_le_bytes([image[11], image[12]])),
                sector,
                "BPB_BytsPerSec"
            );
            assert_eq!(image.len() as u64 % sector, 0);
            let fs = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
            assert_eq!(fs.fat_type(), FatType::Fat16);
            assert_eq!(fs.volume_label_as_bytes(), b"cidata");
            for (name, content) in &files {
                let mut read = Vec::new();
                std::io::Read::read_to_end(&mut fs.root_dir().open_file(name).unwrap(), &mut read).unwrap();
                assert_eq!(&read, content, "{name}");
            }
        }
    }

    #[test]
    fn plan_fat_image_is_bounded() {
        let huge = vec![("a".to_owned(), vec![0; MAX_CONTENT + 1])];
        assert!(matches!(image("x", 512, &huge), Err(FatError::TooLarge { .. })));
        assert!(matches!(image("twelve chars", 512, &[]), Err(FatError::Label(_))));
        for sector in [0, 256, 1000, 8192, 1 << 20] {
            assert!(matches!(image("x", sector, &[]), Err(FatError::Sector(_))));
        }
        assert!(matches!(
            image("x", 512, &[("a?b".to_owned(), vec![])]),
            Err(FatError::File { .. })
        ));
    }
}
