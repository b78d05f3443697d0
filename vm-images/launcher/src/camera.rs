//! Pictures of the screen, one at a time: libvirt gives what qemu has drawn, [`crate::picture`] makes a PNG of it.
//!
//! A picture takes memory until its reader has all of it; that is when the next one is taken. A libvirt that hangs at one
//! gets no second.

use std::sync::{Arc, OnceLock};

use axum::body::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::hypervisor::{Guest, HypervisorError};
use crate::picture::{PictureError, to_png};
use crate::queue::Queue;

/// Takes pictures of one machine's screen; clones are the same.
#[derive(Clone)]
pub struct Camera {
    guest: Arc<OnceLock<Queue<Guest>>>,
    free: Arc<Semaphore>,
}

/// A PNG, and the camera's word that there is no other.
#[derive(Debug)]
pub struct Picture {
    /// All of it.
    pub png: Bytes,
    /// Ends with whoever reads it.
    pub permit: OwnedSemaphorePermit,
}

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum CameraError {
    /// The machine does not run yet, or not any more.
    #[error("the domain does not run")]
    NotRunning,
    /// libvirt.
    #[error(transparent)]
    Libvirt(#[from] HypervisorError),
    /// What qemu has drawn.
    #[error("converting the picture of the screen")]
    Picture(#[from] PictureError),
}

impl Default for Camera {
    fn default() -> Self {
        Self {
            guest: Arc::default(),
            free: Arc::new(Semaphore::new(1)),
        }
    }
}

impl Camera {
    /// The machine runs from now on.
    ///
    /// # Errors
    /// When no thread can be started for the questions to libvirt.
    pub(crate) fn attach(&self, guest: Guest) -> std::io::Result<()> {
        let queue = Queue::start("libvirt-screen", guest)?;
        // There is one domain in a launcher's life.
        let _ = self.guest.set(queue);
        Ok(())
    }

    /// Takes a picture once nobody has one. Waits as long as libvirt does.
    ///
    /// # Errors
    /// [`CameraError`].
    pub async fn take(&self) -> Result<Picture, CameraError> {
        let guest = self.guest.get().ok_or(CameraError::NotRunning)?;
        let free = Arc::clone(&self.free).acquire_owned().await;
        // Nobody closes the semaphore.
        let permit = free.map_err(|_| CameraError::NotRunning)?;
        let (reply, answer) = oneshot::channel();
        guest.call(move |guest| {
            let png = guest
                .screenshot()
                .map_err(CameraError::from)
                .and_then(|screenshot| Ok(to_png(screenshot)?));
            let png = png.map(Bytes::from);
            // Who has asked may have gone.
            let _ = reply.send(png.map(|png| Picture { png, permit }));
        });
        answer.await.map_err(|_| CameraError::NotRunning)?
    }
}
