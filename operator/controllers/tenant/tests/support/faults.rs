//! A client that dies at a chosen write, before it or after it, and one that counts writes.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use http::{Method, Request, Response};
use kube::{Client, client::ClientBuilder};
use tower::{BoxError, Layer, Service};

/// When the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Before the write reaches the API server.
    Before,
    /// After it, before the answer is seen.
    After,
}

/// Counts writes, and dies at one of them.
#[derive(Clone, Default)]
pub struct Fault {
    writes: Arc<AtomicUsize>,
    dead: Arc<AtomicBool>,
    at: Option<(usize, Death)>,
}

impl Fault {
    /// Dies at the n-th write, counted from 1.
    pub fn at(n: usize, death: Death) -> Self {
        Fault {
            at: Some((n, death)),
            ..Fault::default()
        }
    }

    /// Whether it came to that.
    pub fn died(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Writes sent so far.
    pub fn writes(&self) -> usize {
        self.writes.load(Ordering::SeqCst)
    }

    /// `config`'s client with this fault in it.
    pub fn client(&self, mut config: kube::Config) -> Client {
        config.default_retry = false;
        ClientBuilder::try_from(config).unwrap().with_layer(self).build()
    }
}

impl<S> Layer<S> for Fault {
    type Service = Faulty<S>;

    fn layer(&self, inner: S) -> Faulty<S> {
        Faulty {
            inner,
            fault: self.clone(),
        }
    }
}

pub struct Faulty<S> {
    inner: S,
    fault: Fault,
}

impl<S, B, R> Service<Request<B>> for Faulty<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    R: Send + 'static,
{
    type Response = Response<R>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<R>, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let fault = self.fault.clone();
        let dead = || -> BoxError { "the process is dead".into() };
        // Events are for people; a lost one changes nothing.
        let write = request.method() != Method::GET && !request.uri().path().contains("/events");
        let n = if write {
            fault.writes.fetch_add(1, Ordering::SeqCst) + 1
        } else {
            0
        };
        let hit = fault.at.filter(|(at, _)| write && *at == n);
        if fault.died() || matches!(hit, Some((_, Death::Before))) {
            fault.dead.store(true, Ordering::SeqCst);
            return Box::pin(std::future::ready(Err(dead())));
        }
        let answer: Pin<Box<_>> = Box::pin(self.inner.call(request));
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into);
            if hit.is_some() {
                fault.dead.store(true, Ordering::SeqCst);
                return Err(dead());
            }
            answer
        })
    }
}
