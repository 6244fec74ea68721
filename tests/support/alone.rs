//! A test that names addresses of other machines, run in a network namespace of its own: only loopback is there, so
//! that nothing leaves the machine even if hone fails to refuse.

use std::process::Command;

/// Set in the process inside.
const INSIDE: &str = "HONE_TEST_ALONE";

/// Runs the test of this name once more, inside. True in the process inside, which has to do the work.
pub fn is_alone(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        raise_loopback();
        return true;
    }
    let mut inside = Command::new("unshare");
    inside.args(["--map-root-user", "--net"]).arg(std::env::current_exe().unwrap());
    inside.args([test, "--exact", "--nocapture"]).env(INSIDE, "1");
    let ended = inside.output().unwrap();
    let told = [ended.stdout, ended.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(ended.status.success() && told.contains("1 passed"), "{told}");
    false
}

/// Starts the loopback interface, which is down in a new namespace.
fn raise_loopback() {
    // SAFETY: the socket is closed here, and the structure is a whole one of zeros, whose name and flags are then set.
    let done = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let mut wish: libc::ifreq = std::mem::zeroed();
        wish.ifr_name[..2].copy_from_slice(&[b'l', b'o'].map(|letter| letter as libc::c_char));
        wish.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let done = libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &raw const wish);
        libc::close(socket);
        done
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
