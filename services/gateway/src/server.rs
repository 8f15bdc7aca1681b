//! Binding, and serving until told to stop.

use crate::Gateway;
use crate::routes::{guarded, routes};
use crate::state::State;
use actix_web::dev::Server;
use actix_web::{App, HttpServer, middleware, web};
use anyhow::{Context, bail};
use kit::lane::Stop;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

/// How long an idle connection is kept, as long as most proxies do.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How long a client may take to read the end of an answer, and to notice that it is refused.
const DISCONNECT_MAX: Duration = Duration::from_secs(5);
/// Threads that read requests and write answers; the work is done elsewhere.
const THREADS: usize = 2;
/// Connections a thread holds open; further ones wait in the system's queue.
const CONNECTIONS_PER_THREAD_MAX: usize = 8192;

/// A gateway that holds its address.
pub struct Bound {
    server: Server,
    address: SocketAddr,
    state: web::Data<State>,
}

impl Gateway {
    /// Takes the address, so that one in use is known before anything else is done. With port 0, any
    /// free port.
    ///
    /// # Errors
    /// When the address is in use, not this machine's, or not allowed: beyond loopback, keys are needed.
    pub fn bind(self, stop: Stop) -> anyhow::Result<Bound> {
        let listen = self.settings.gateway.listen.clone();
        let addresses = allowed(&listen, &self.settings.gateway.api_keys)?;
        let header_time_max = Duration::from_secs(self.settings.gateway.header_seconds_max);
        let stop_seconds_max = self.settings.supervisor.stop_seconds_max;
        let state = web::Data::new(State::new(self, stop.clone()));
        let shared = state.clone();
        let app =
            move || App::new().app_data(shared.clone()).configure(routes).wrap(middleware::from_fn(guarded));
        let server = HttpServer::new(app)
            .workers(THREADS)
            .max_connections(CONNECTIONS_PER_THREAD_MAX)
            .keep_alive(KEEP_ALIVE)
            .client_request_timeout(header_time_max)
            .client_disconnect_timeout(DISCONNECT_MAX)
            // A client that has left is not worth generating for.
            .h1_allow_half_closed(false)
            .tcp_nodelay(true)
            .disable_signals()
            .shutdown_timeout(stop_seconds_max)
            .shutdown_signal(stop.wait());
        let server = server.bind(&addresses[..1]).map_err(|error| explained(&listen, error))?;
        let address = server.addrs().first().copied().context("the server has no address")?;
        Ok(Bound { server: server.run(), address, state })
    }

    /// Binds, and serves until `stop` is set and running requests have ended.
    ///
    /// # Errors
    /// As for [`Gateway::bind`], or when accepting connections fails.
    pub async fn serve(self, stop: Stop) -> anyhow::Result<()> {
        self.bind(stop)?.serve().await
    }
}

impl Bound {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the gateway's `stop` is set and running requests have ended.
    ///
    /// # Errors
    /// When accepting connections fails.
    pub async fn serve(self) -> anyhow::Result<()> {
        tracing::info!(address = %self.address, "listening");
        tokio::select! {
            ended = self.server => ended.context("the HTTP server ended"),
            () = self.state.gateway.metrics.clone().upkeep() => Ok(()),
            () = self.state.pulse.watch(&self.state.gateway.metrics) => Ok(()),
        }
    }
}

/// The addresses that `listen` stands for, if they may be listened on.
///
/// # Errors
/// When it stands for none, or others could reach it and no key is asked for.
pub fn allowed(listen: &str, keys: &[String]) -> anyhow::Result<Vec<SocketAddr>> {
    let found = listen.to_socket_addrs();
    let found: Vec<SocketAddr> = found
        .with_context(|| format!("gateway.listen: '{listen}' is not an address, such as 127.0.0.1:8420"))?
        .collect();
    if found.is_empty() {
        bail!("gateway.listen: '{listen}' stands for no address");
    }
    if keys.is_empty() && found.iter().any(|address| !address.ip().is_loopback()) {
        bail!(
            "gateway.listen: others can reach {listen}, so a key is needed: set gateway.api_keys, \
             or listen on 127.0.0.1"
        );
    }
    Ok(found)
}

fn explained(listen: &str, error: io::Error) -> anyhow::Error {
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => "it is in use, perhaps by another engram; choose another with --listen",
        io::ErrorKind::PermissionDenied => "this needs more rights; ports from 1024 up do not",
        io::ErrorKind::AddrNotAvailable => "it is not an address of this machine",
        _ => "the system refuses",
    };
    anyhow::Error::new(error).context(format!("cannot listen on {listen}: {why}"))
}
