//! Frames and packets of the stage: pings, forged VXLAN, and a guest's frames on their way to its tap.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::libc;

/// One echo request (RFC 792) and whether its answer comes.
pub fn echo(to: Ipv4Addr, sequence: u8, bytes: usize) -> bool {
    // SAFETY: a plain system call; the descriptor is checked and from then on owned by the socket. Of std's sockets only
    // those of UDP send and receive single packets, which is all that is asked of it.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        UdpSocket::from_raw_fd(fd)
    };
    socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    let mut request = vec![0; 8 + bytes];
    (request[0], request[5], request[7]) = (8, 0x77, sequence);
    let sum = !(0x0800u16 + 0x77 + u16::from(sequence));
    request[2..4].copy_from_slice(&sum.to_be_bytes());
    if socket.send_to(&request, (to, 0)).is_err() {
        return false;
    }
    let mut answer = vec![0; 65_536];
    // 20 bytes of IP, then an echo reply of ours.
    while let Ok(length) = socket.recv(&mut answer) {
        if length == 28 + bytes && answer[20] == 0 && (answer[25], answer[27]) == (0x77, sequence) {
            return true;
        }
    }
    false
}

/// Carries frames, each with its virtio header, between two taps.
pub fn carry(mut a: File, mut b: File, stop: &AtomicBool) {
    let mut frame = [0; 65_600];
    while !stop.load(Ordering::Relaxed) {
        let poll = |file: &File| libc::pollfd {
            fd: file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut ready = [poll(&a), poll(&b)];
        // SAFETY: an array of two whole pollfd that outlives the call.
        unsafe { libc::poll(ready.as_mut_ptr(), 2, 50) };
        let [from_a, from_b] = ready.map(|fd| fd.revents & libc::POLLIN != 0);
        if from_a {
            let length = a.read(&mut frame).unwrap_or_default();
            let _ = b.write(&frame[..length]);
        }
        if from_b {
            let length = b.read(&mut frame).unwrap_or_default();
            let _ = a.write(&frame[..length]);
        }
    }
}
