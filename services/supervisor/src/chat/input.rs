//! Lines to answer: typed, with what was typed before at hand, or through a pipe.

use crate::base;
use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::fs;
use std::io::{IsTerminal, Lines, StdinLock, stdin};
use std::path::PathBuf;

/// Where lines come from.
pub enum Input {
    /// A person's keyboard; the history of lines is kept in the file.
    Typed(Box<DefaultEditor>, Option<PathBuf>),
    /// Another program.
    Piped(Lines<StdinLock<'static>>),
}

impl Input {
    /// Standard input.
    ///
    /// # Errors
    /// When a terminal cannot be used.
    pub fn new() -> Result<Self> {
        if !stdin().is_terminal() {
            return Ok(Self::Piped(stdin().lines()));
        }
        let mut editor = DefaultEditor::new().context("the terminal cannot be read")?;
        let file = base::data_dir().ok().map(|dir| dir.join("chat-history"));
        if let Some(file) = &file {
            // Without a file there is no history yet.
            let _ = file.parent().map(fs::create_dir_all);
            let _ = editor.load_history(file);
        }
        Ok(Self::Typed(Box::new(editor), file))
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Typed(..))
    }

    /// The next line; none at the end.
    ///
    /// # Errors
    /// When it is not text.
    pub fn next_line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Self::Piped(lines) => lines.next().transpose().context("standard input is not UTF-8 text"),
            Self::Typed(editor, file) => match editor.readline(prompt) {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    if let Some(file) = file {
                        // A history that cannot be kept is no reason to end a conversation.
                        let _ = editor.save_history(file);
                    }
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(error) => Err(error).context("the terminal cannot be read"),
            },
        }
    }
}
