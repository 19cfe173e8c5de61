//! The threads of an engine, and what becomes of their errors.
use std::thread;

use super::EngineError;

/// The result, unless a stage has failed: then the error of the one that did not merely lose a neighbour.
pub(super) fn first_cause<T>(
    errors: impl IntoIterator<Item = Option<EngineError>>,
    result: Result<T, EngineError>,
) -> Result<T, EngineError> {
    let (value, own) = match result {
        Ok(value) => (Some(value), None),
        Err(error) => (None, Some(error)),
    };
    let mut errors: Vec<EngineError> = errors.into_iter().chain([own]).flatten().collect();
    errors.sort_by_key(|error| matches!(error, EngineError::WorkerLost));
    match (errors.into_iter().next(), value) {
        (Some(error), _) => Err(error),
        (None, Some(value)) => Ok(value),
        (None, None) => Err(EngineError::WorkerLost),
    }
}

pub(super) fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<thread::JoinHandle<T>, EngineError> {
    thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map_err(EngineError::Thread)
}

pub(super) fn join<T>(handle: thread::JoinHandle<Result<T, EngineError>>) -> Result<T, EngineError> {
    handle.join().unwrap_or(Err(EngineError::WorkerLost))
}
