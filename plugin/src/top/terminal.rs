//! The terminal, taken over and given back as it was.
use std::io::{self, Write, stdin, stdout};

use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The other screen, without a cursor; and back.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// Keys come at once and unseen until it is dropped.
pub struct Terminal {
    before: Termios,
}

impl Terminal {
    pub fn take() -> io::Result<Terminal> {
        let before = tcgetattr(stdin())?;
        let mut modes = before.clone();
        // Without ISIG Ctrl-C is a key: nothing ends the process before the terminal is as it was. Without IXON nobody stops
        // the drawing, and with it the keys, by Ctrl-S.
        modes.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        modes.input_modes -= InputModes::IXON;
        tcsetattr(stdin(), OptionalActions::Now, &modes)?;
        let terminal = Terminal { before };
        write(ENTER)?;
        Ok(terminal)
    }

    /// Puts the lines in the place of those before. There is no room below the last row.
    pub fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let rows = tcgetwinsize(stdout()).map_or(usize::MAX, |size| usize::from(size.ws_row).max(1));
        write(&frame(lines, rows))
    }

    /// What has been typed.
    pub fn keys(&mut self) -> io::Result<Vec<u8>> {
        let mut keys = [0; 64];
        let count = rustix::io::retry_on_intr(|| rustix::io::read(stdin(), &mut keys))?;
        Ok(keys.get(..count).unwrap_or_default().to_vec())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // One that has gone needs nothing.
        let _ = write(LEAVE);
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}

/// Columns of standard output; `None`: it is no terminal.
pub fn width() -> Option<usize> {
    let size = tcgetwinsize(stdout()).ok()?;
    // Some terminals do not know theirs.
    Some(match size.ws_col {
        0 => 80,
        columns => usize::from(columns),
    })
}

fn frame(lines: &[String], rows: usize) -> Vec<u8> {
    let mut frame = b"\x1b[H".to_vec();
    let shown = lines.len().min(rows);
    for (at, line) in lines.iter().take(shown).enumerate() {
        frame.extend_from_slice(line.as_bytes());
        frame.extend_from_slice(b"\x1b[K");
        if at + 1 < rows {
            frame.extend_from_slice(b"\r\n");
        }
    }
    if shown < rows {
        frame.extend_from_slice(b"\x1b[J");
    }
    frame
}

fn write(bytes: &[u8]) -> io::Result<()> {
    let mut output = stdout().lock();
    output.write_all(bytes)?;
    output.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_no_more_lines_than_there_are_rows() {
        let lines = ["a".to_owned(), "b".to_owned()];
        assert_eq!(frame(&lines, 2), b"\x1b[Ha\x1b[K\r\nb\x1b[K");
        assert_eq!(frame(&lines, 1), b"\x1b[Ha\x1b[K");
        assert_eq!(frame(&lines, 3), b"\x1b[Ha\x1b[K\r\nb\x1b[K\r\n\x1b[J");
    }
}
