//! A layer below the client under test: counts writes, stops the world at a chosen one, lets caches grow old.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use http::{Method, Request, Response};
use kube::client::Body;
use tokio::sync::{Mutex, Notify};
use tower::{Layer, Service};

use super::stage::SYSTEM;

/// Counts writes (events apart) and kills at one of them.
#[derive(Clone)]
pub struct Gate {
    /// The write whose answer is never seen, and after which nothing is written any more; counted from 0. What the API
    /// server refuses is none: to die then is to die before the next.
    kill_after: Option<usize>,
    /// Watches of this resource never say anything: what the client knows of it stays as it was first listed.
    deaf_to: Option<&'static str>,
    /// Somebody died at a launcher's Secret.
    died_at_secret: Arc<AtomicBool>,
    writes: Arc<AtomicUsize>,
    done: Arc<Mutex<usize>>,
    reached: Arc<Notify>,
}

impl Gate {
    pub fn new(kill_after: Option<usize>) -> Self {
        Self {
            kill_after,
            deaf_to: None,
            died_at_secret: Arc::default(),
            writes: Arc::default(),
            done: Arc::default(),
            reached: Arc::default(),
        }
    }

    /// Kills nobody, and lets no watch of `resource` say anything.
    pub fn deaf_to(resource: &'static str) -> Self {
        Self {
            deaf_to: Some(resource),
            ..Self::new(None)
        }
    }

    /// The gate of the next operator, after the one that died at this one.
    ///
    /// After a death at a launcher's Secret the next such Secret is none to die at: its name is known only to who made it,
    /// so an operator that dies there each time gets nowhere.
    pub fn next(&self) -> Self {
        Self {
            died_at_secret: self.died_at_secret.clone(),
            ..Self::new(self.kill_after)
        }
    }

    /// Attempts to write so far, rehearsals among them.
    pub fn writes(&self) -> usize {
        self.writes.load(Ordering::SeqCst)
    }

    /// Waits until the write to die at.
    pub async fn reached(&self) {
        self.reached.notified().await;
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated {
            gate: self.clone(),
            inner,
        }
    }
}

#[derive(Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S, B> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let is_write = request.method() != Method::GET && !path.contains("/events");
        let is_watch = request.uri().query().is_some_and(|query| query.contains("watch="));
        if is_watch
            && self
                .gate
                .deaf_to
                .is_some_and(|resource| path.ends_with(&format!("/{resource}")))
        {
            return Box::pin(pending());
        }
        let is_rehearsal = request.uri().query().is_some_and(|query| query.contains("dryRun"));
        let is_secret = path.ends_with("/secrets") && !path.contains(SYSTEM);
        let answer = self.inner.call(request);
        if !is_write {
            return Box::pin(answer);
        }
        self.gate.writes.fetch_add(1, Ordering::SeqCst);
        if is_rehearsal || is_secret && self.gate.died_at_secret.swap(false, Ordering::SeqCst) {
            return Box::pin(answer);
        }
        let gate = self.gate.clone();
        Box::pin(async move {
            let Some(at) = gate.kill_after else {
                return answer.await;
            };
            // One after the other; who dies never lets go.
            let mut done = gate.done.lock().await;
            let answer = answer.await;
            if answer.as_ref().is_ok_and(|answer| answer.status().is_client_error()) {
                return answer;
            }
            if *done == at {
                drop(answer);
                gate.died_at_secret.store(is_secret, Ordering::SeqCst);
                gate.reached.notify_one();
                return pending().await;
            }
            *done += 1;
            answer
        })
    }
}
