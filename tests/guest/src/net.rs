//! Datagrams between guests and dom0s: one line of text each, on fixed ports that
//! `scripts/lab rate` leaves outside its limit.

use std::io::IoSliceMut;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, sockopt};
use nix::sys::time::{TimeSpec, TimeVal};

pub const TICK_PORT: u16 = 7001;
pub const REPORT_PORT: u16 = 7002;

/// The broadcast address of the lab's bridge.
const EVERYBODY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 255);

pub struct Broadcaster {
    socket: UdpSocket,
    to: SocketAddrV4,
}

impl Broadcaster {
    pub fn new(port: u16) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("no UDP socket")?;
        socket.set_broadcast(true)?;
        Ok(Self {
            socket,
            to: SocketAddrV4::new(EVERYBODY, port),
        })
    }

    /// A datagram that cannot be sent (the vif is being reconnected) is a lost one: the receiver
    /// sees the hole in the sequence.
    pub fn send(&self, line: &str) {
        let _ = self.socket.send_to(line.as_bytes(), self.to);
    }
}

pub struct Listener {
    socket: OwnedFd,
}

pub struct Received {
    pub line: String,
    /// Since the epoch, stamped by the kernel on arrival, so that a busy dom0 does not look like
    /// a silent guest.
    pub at: Duration,
}

impl Listener {
    pub fn new(port: u16) -> anyhow::Result<Self> {
        let socket = socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // Several listeners at once each get every broadcast.
        socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        socket::setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        socket::setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000))?;
        socket::bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))
            .with_context(|| format!("cannot listen on UDP port {port}"))?;
        Ok(Self { socket })
    }

    /// `None` after 100 ms without a datagram.
    pub fn receive(&self) -> anyhow::Result<Option<Received>> {
        let mut bytes = [0; 512];
        let mut control = nix::cmsg_space!(TimeSpec);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let message = match socket::recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut buffers,
            Some(&mut control),
            MsgFlags::empty(),
        ) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error).context("cannot receive"),
        };
        let stamped = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmTimestampns(at) => Some(Duration::from(at)),
            _ => None,
        });
        let length = message.bytes;
        Ok(Some(Received {
            line: String::from_utf8_lossy(&bytes[..length]).into_owned(),
            at: stamped.unwrap_or_else(now),
        }))
    }
}

pub fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
