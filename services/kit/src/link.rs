//! How services are connected: links that carry messages on credit, doors for questions, and
//! streams of events that answer one request.

use crate::service::Message;
use actix::Recipient;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// The far end of a link is gone: its lane is being built anew, or the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the service at the far end of the link is gone")]
pub struct Closed;

/// A message with the permit it travels on. The permit goes back when this is dropped, which is
/// when the message is settled.
pub struct Delivery<M> {
    message: M,
    _permit: OwnedSemaphorePermit,
}

impl<M> Deref for Delivery<M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.message
    }
}

impl<M: Send + 'static> actix::Message for Delivery<M> {
    type Result = ();
}

/// An edge of the pipeline. A mailbox is no bound, so the edge is one: nothing is sent without a
/// permit, and there are only so many.
pub struct Link<M: Message> {
    far: Far<M>,
    credit: Arc<Semaphore>,
    capacity: usize,
}

enum Far<M: Message> {
    Host(Recipient<Delivery<M>>),
    Channel(mpsc::Sender<M>),
}

impl<M: Message> Clone for Link<M> {
    fn clone(&self) -> Self {
        let far = match &self.far {
            Far::Host(recipient) => Far::Host(recipient.clone()),
            Far::Channel(sender) => Far::Channel(sender.clone()),
        };
        Self { far, credit: Arc::clone(&self.credit), capacity: self.capacity }
    }
}

impl<M: Message> Link<M> {
    pub(crate) fn to_host(recipient: Recipient<Delivery<M>>, capacity: usize) -> Self {
        Self { far: Far::Host(recipient), credit: Arc::new(Semaphore::new(capacity)), capacity }
    }

    /// A link whose far end is a receiver: how a service is tested without a pipeline.
    pub fn to_channel(capacity: usize) -> (Self, mpsc::Receiver<M>) {
        let (sender, receiver) = mpsc::channel(capacity);
        let credit = Arc::new(Semaphore::new(capacity));
        (Self { far: Far::Channel(sender), credit, capacity }, receiver)
    }

    /// Sends a message, as soon as there is a permit for it.
    ///
    /// # Errors
    /// When the far end is gone; unsettled work comes again from what is durable.
    pub async fn send(&self, message: M) -> Result<(), Closed> {
        let recipient = match &self.far {
            Far::Host(recipient) => recipient,
            Far::Channel(sender) => return sender.send(message).await.map_err(|_| Closed),
        };
        let permit = Arc::clone(&self.credit).acquire_owned().await.map_err(|_| Closed)?;
        if !recipient.connected() {
            return Err(Closed);
        }
        recipient.do_send(Delivery { message, _permit: permit });
        Ok(())
    }

    /// Messages that were sent and are not settled yet.
    pub fn in_flight(&self) -> usize {
        self.capacity - self.credit.available_permits()
    }
}

/// Why a question got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// Nobody is behind the door just now; the lane may be on its way back.
    #[error("the service is not running just now")]
    Closed,
    /// As many questions as allowed are waiting already.
    #[error("too many questions are waiting")]
    Busy,
    /// To be asked again after this time.
    #[error("to be asked again in {0:?}")]
    Later(Duration),
    /// The question cannot be answered as it stands.
    #[error("{0}")]
    Refused(String),
}

/// A question on its way, with the permit it travels on.
pub struct Ask<Q, R> {
    question: Q,
    permit: OwnedSemaphorePermit,
    reply: std::marker::PhantomData<fn() -> R>,
}

impl<Q, R> Ask<Q, R> {
    pub(crate) fn into_parts(self) -> (Q, OwnedSemaphorePermit) {
        (self.question, self.permit)
    }
}

impl<Q: Send + 'static, R: Send + 'static> actix::Message for Ask<Q, R> {
    type Result = Result<R, Unanswered>;
}

/// Where questions are asked and answered.
///
/// A door outlives the service behind it: it is made once and handed to both sides, and each new
/// incarnation of the service takes its place behind it. So it may lead from one lane to another.
pub struct Door<Q: Send + 'static, R: Send + 'static> {
    far: Arc<RwLock<Behind<Q, R>>>,
    credit: Arc<Semaphore>,
}

enum Behind<Q: Send + 'static, R: Send + 'static> {
    Nobody,
    Host(Recipient<Ask<Q, R>>),
    Channel(mpsc::UnboundedSender<(Q, oneshot::Sender<R>)>),
}

impl<Q: Send + 'static, R: Send + 'static> Clone for Door<Q, R> {
    fn clone(&self) -> Self {
        Self { far: Arc::clone(&self.far), credit: Arc::clone(&self.credit) }
    }
}

impl<Q: Send + 'static, R: Send + 'static> Door<Q, R> {
    /// A door with nobody behind it yet, at which at most `credit` questions wait.
    pub fn new(credit: usize) -> Self {
        Self::with(Behind::Nobody, credit)
    }

    /// A door whose far end is a receiver, for tests.
    pub fn to_channel(credit: usize) -> (Self, mpsc::UnboundedReceiver<(Q, oneshot::Sender<R>)>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self::with(Behind::Channel(sender), credit), receiver)
    }

    fn with(behind: Behind<Q, R>, credit: usize) -> Self {
        Self { far: Arc::new(RwLock::new(behind)), credit: Arc::new(Semaphore::new(credit)) }
    }

    pub(crate) fn bind(&self, recipient: Recipient<Ask<Q, R>>) {
        *self.far.write().unwrap_or_else(PoisonError::into_inner) = Behind::Host(recipient);
    }

    /// Whether somebody is behind it.
    pub fn is_open(&self) -> bool {
        match &*self.far.read().unwrap_or_else(PoisonError::into_inner) {
            Behind::Nobody => false,
            Behind::Host(recipient) => recipient.connected(),
            Behind::Channel(sender) => !sender.is_closed(),
        }
    }

    /// Asks, as soon as there is a permit for it, and waits for the answer.
    ///
    /// # Errors
    /// As [`Unanswered`] says, but for `Busy`.
    pub async fn ask(&self, question: Q) -> Result<R, Unanswered> {
        let permit = Arc::clone(&self.credit).acquire_owned().await.map_err(|_| Unanswered::Closed)?;
        self.ask_with(permit, question).await
    }

    /// Asks, if there is a permit for it now, and waits for the answer.
    ///
    /// # Errors
    /// As [`Unanswered`] says.
    pub async fn try_ask(&self, question: Q) -> Result<R, Unanswered> {
        let permit = Arc::clone(&self.credit).try_acquire_owned().map_err(|_| Unanswered::Busy)?;
        self.ask_with(permit, question).await
    }

    /// Questions that could be asked now without waiting for a permit.
    pub fn permits(&self) -> usize {
        self.credit.available_permits()
    }

    async fn ask_with(&self, permit: OwnedSemaphorePermit, question: Q) -> Result<R, Unanswered> {
        enum Answer<A, B> {
            Host(A),
            Channel(B),
        }
        // The lock is for the sending alone: an answer may take long.
        let answer = match &*self.far.read().unwrap_or_else(PoisonError::into_inner) {
            Behind::Nobody => return Err(Unanswered::Closed),
            Behind::Host(recipient) => {
                let reply = std::marker::PhantomData;
                Answer::Host(recipient.send(Ask { question, permit, reply }))
            }
            Behind::Channel(sender) => {
                let (reply, answer) = oneshot::channel();
                sender.send((question, reply)).map_err(|_| Unanswered::Closed)?;
                Answer::Channel(answer)
            }
        };
        match answer {
            Answer::Host(request) => request.await.map_err(|_| Unanswered::Closed)?,
            Answer::Channel(answer) => answer.await.map_err(|_| Unanswered::Closed),
        }
    }
}

/// A stream of events that answers one request: the sender, and the receiver. At most `capacity`
/// events wait in it, at least one.
pub fn events<E>(capacity: usize) -> (ReplyTo<E>, Events<E>) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    (ReplyTo { sender }, Events { receiver })
}

/// Where the events that answer a request go. Usable from any thread.
#[derive(Debug, Clone)]
pub struct ReplyTo<E> {
    sender: mpsc::Sender<E>,
}

/// Why an event was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// The receiver is behind by as many events as fit.
    #[error("the receiver is too slow")]
    Full,
    /// Nobody waits for the answer any more.
    #[error("the receiver went away")]
    Gone,
}

impl<E> ReplyTo<E> {
    /// Sends an event, if there is room for it now.
    ///
    /// # Errors
    /// When there is none, or when nobody waits for the answer any more.
    pub fn try_send(&self, event: E) -> Result<(), NotTaken> {
        self.sender.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => NotTaken::Full,
            mpsc::error::TrySendError::Closed(_) => NotTaken::Gone,
        })
    }

    /// Sends an event, waiting for room. For threads of their own only: it panics within async code.
    ///
    /// # Errors
    /// When nobody waits for the answer any more.
    pub fn blocking_send(&self, event: E) -> Result<(), NotTaken> {
        self.sender.blocking_send(event).map_err(|_| NotTaken::Gone)
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_gone(&self) -> bool {
        self.sender.is_closed()
    }
}

/// The events that answer a request, in order.
#[derive(Debug)]
pub struct Events<E> {
    receiver: mpsc::Receiver<E>,
}

impl<E> Events<E> {
    /// The next event; none once the sender is gone. A stream that ends before its last event was
    /// cut off by the death of the sender.
    pub async fn next(&mut self) -> Option<E> {
        self.receiver.recv().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sender_hears_when_the_receiver_is_slow_or_gone() {
        let (reply, mut events) = events(1);
        reply.try_send(1).expect("room");
        assert_eq!(reply.try_send(2), Err(NotTaken::Full));
        assert_eq!(events.next().await, Some(1));
        drop(events);
        assert!(reply.is_gone());
        assert_eq!(reply.try_send(3), Err(NotTaken::Gone));
        std::thread::spawn(move || assert_eq!(reply.blocking_send(4), Err(NotTaken::Gone)))
            .join()
            .expect("joined");
    }

    #[tokio::test]
    async fn a_door_without_permits_is_busy() {
        let (door, mut questions) = Door::<u32, u32>::to_channel(1);
        let answered = async {
            let (question, reply) = questions.recv().await.expect("asked");
            assert_eq!(door.try_ask(0).await, Err(Unanswered::Busy));
            reply.send(question + 1).expect("wanted");
        };
        let (answer, ()) = tokio::join!(door.ask(1), answered);
        assert_eq!(answer, Ok(2));
        assert!(door.is_open() && !Door::<u32, u32>::new(1).is_open());
        drop(questions);
        assert!(!door.is_open());
        assert_eq!(door.ask(1).await, Err(Unanswered::Closed));
    }
}
