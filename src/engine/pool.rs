//! Workers for what can be done side by side: hashing, compressing, decompressing.
use std::sync::LazyLock;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::EngineError;
use super::threads::spawn;
use crate::codec::{Compressor, Decompressor};

/// What each worker keeps between jobs.
#[derive(Default)]
pub struct Tools {
    pub compressor: Compressor,
    pub decompressor: Decompressor,
}

type Job = Box<dyn FnOnce(&mut Tools) + Send>;

/// A number of worker threads; they end when the pool is dropped.
#[derive(Clone)]
pub struct Pool {
    jobs: Sender<Job>,
    workers: usize,
}

/// The most workers: beyond that their memory would not stay within the agents' bound.
const MAX_WORKERS: usize = 8;

/// Processors that this process may use. Finding out takes a millisecond.
pub(super) fn processors() -> usize {
    static PROCESSORS: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));
    *PROCESSORS
}

/// A job's result, when it comes.
pub struct Pending<T>(Receiver<T>);

impl Pool {
    /// As many workers as the process may use processors, at most [`MAX_WORKERS`].
    pub fn start() -> Result<Pool, EngineError> {
        let workers = processors().min(MAX_WORKERS);
        let (jobs, queue) = unbounded::<Job>();
        for _ in 0..workers {
            let queue = queue.clone();
            let work = move || {
                let mut tools = Tools::default();
                queue.iter().for_each(|job| job(&mut tools));
            };
            spawn("xenfold-worker", work)?;
        }
        Ok(Pool { jobs, workers })
    }

    pub fn workers(&self) -> usize {
        self.workers
    }

    /// Hands a job to the next free worker. What is queued is bounded by the callers, who wait for results in order.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut Tools) -> T + Send + 'static) -> Pending<T> {
        let (done, result) = bounded(1);
        let job = move |tools: &mut Tools| {
            // Nobody waits any more when the migration has failed meanwhile.
            let _ = done.send(job(tools));
        };
        // A pool whose workers are gone shows as WorkerLost when the result is waited for.
        let _ = self.jobs.send(Box::new(job));
        Pending(result)
    }
}

impl<T> Pending<T> {
    pub fn wait(self) -> Result<T, EngineError> {
        self.0.recv().map_err(|_| EngineError::WorkerLost)
    }
}
