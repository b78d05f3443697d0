//! A layer below the client under test: counts writes, and stops the world at a chosen one.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use http::{Method, Request};
use kube::client::Body;
use tokio::sync::Notify;
use tower::{Layer, Service};

/// Counts writes (events apart) and kills at one of them.
#[derive(Clone)]
pub struct Gate {
    /// The write whose answer is never seen, and after which nothing is written any more; counted from 0.
    kill_after: Option<usize>,
    writes: Arc<AtomicUsize>,
    reached: Arc<Notify>,
}

impl Gate {
    pub fn new(kill_after: Option<usize>) -> Self {
        Self {
            kill_after,
            writes: Arc::default(),
            reached: Arc::default(),
        }
    }

    /// Writes so far.
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

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>>,
    S::Future: Send + 'static,
    S::Response: 'static,
    S::Error: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_write = request.method() != Method::GET && !request.uri().path().contains("/events");
        if !is_write {
            return Box::pin(self.inner.call(request));
        }
        let number = self.gate.writes.fetch_add(1, Ordering::SeqCst);
        let reached = self.gate.reached.clone();
        match self.gate.kill_after {
            Some(at) if number > at => Box::pin(pending()),
            Some(at) if number == at => {
                let answer = self.inner.call(request);
                Box::pin(async move {
                    drop(answer.await);
                    reached.notify_one();
                    pending().await
                })
            }
            _ => Box::pin(self.inner.call(request)),
        }
    }
}
