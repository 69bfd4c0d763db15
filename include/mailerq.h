/*
 *  mailerq.h: how to write a plugin for mailerq.
 *
 *  A plugin is a shared object in the directory that the setting `plugin-directory` names. The
 *  files whose name ends in `.so` and does not start with a dot are opened at start, in byte order of
 *  their names, and their functions are called in that order: `10-access.so` always before
 *  `20-greylist.so`. One line builds a plugin; there is no library to link against, because the MQ_
 *  functions below are found in the running program:
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -Wall -o 10-access.so access.c
 *
 *  A plugin exports functions whose names start with `mq_`, in lower case. mailerq looks for each
 *  of them and calls the ones that are there when their moment comes. Only mq_version is required:
 *
 *      #include <mailerq.h>
 *
 *      MQ_EXPORT int mq_version() { return MQ_API_VERSION; }
 *
 *      MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
 *                                       const char *rcptto, size_t size)
 *      {
 *          if (known(rcptto, size)) return false;
 *          MQ_Reject(connection, 550, "5.1.1 No such mailbox");
 *          return false;
 *      }
 *
 *  The functions that start with `MQ_` are what mailerq offers to a plugin. C++ works just so: all
 *  of this page is inside extern "C", which gives the functions that you define the right linkage.
 *
 *
 *  HANDING BACK
 *
 *  A callback that returns false has decided: the next plugin is called, and after the last one
 *  mailerq goes on. A callback that returns true has taken control of this one event. The session
 *  that the event belongs to waits; everything else goes on. Later the plugin gives control back,
 *  by exactly one call of
 *
 *      MQ_Continue     the next plugin is called,
 *      MQ_Complete     the other plugins are skipped and mailerq goes on,
 *      MQ_Retry        the event starts again with the first plugin.
 *
 *  It may do so from a timer, from a watcher, from a libev callback or from a thread of its own;
 *  also before the callback itself has returned: `MQ_Continue(context); return true;`. A hand-back
 *  never calls the next plugin from within: it returns at once, there is no recursion.
 *
 *  What can go wrong is contained. A hand-back that comes twice, or for an event that the plugin
 *  does not have, is ignored and logged with the plugin's name. An event that is not handed back
 *  within `plugin-timeout` (300 seconds unless set otherwise, 0 is never) is given up: an incoming
 *  command is answered with 451, an outgoing message is tried again later. So is an event that was
 *  started again 100 times, and one whose callback throws a C++ exception.
 *
 *  The time counts for each plugin that takes an event. For the end of a mail it counts once:
 *  mq_smtp_in_data and all calls of mq_smtp_in_message for that mail share one plugin-timeout. When
 *  it has passed, each further event has a second, and all of these together have ten.
 *
 *  An event that was given up still belongs to the plugin: its strings and its message stay as they
 *  are, in memory or on disk, until the plugin hands it back or its worker ends. `mailerq status`
 *  shows how many events each plugin keeps, and how much mail that is.
 *
 *
 *  What cannot be contained is named. When a plugin crashes the process (SIGSEGV, SIGBUS, SIGFPE,
 *  SIGILL, SIGABRT) or ends it (exit, _exit), the last line on standard error and in the application
 *  log is "SIGSEGV in mq_smtp_in_rcptto of plugin 10-access.so". The exit status and the core dump
 *  are those that they would be without mailerq. A callback that does not return is named after
 *  `watchdog-seconds`, and when it is still there 5 seconds after `shutdown-timeout` the process
 *  ends with status 70. A plugin that handles these signals itself must call the handlers it found.
 *
 *
 *  THE POINTERS
 *
 *  MQ_Context *, MQ_SmtpConnection *, MQ_Message *, MQ_Timer * and MQ_IOWatcher * are handles. They
 *  look like pointers, but they point nowhere: do not read through them and do not compute with
 *  them. A handle is never used for a second object, so one that is used too late does no harm:
 *  the function does nothing, returns NULL, false or 0, and most of them log it.
 *
 *  The MQ_Context that a callback receives stands for the worker thread, the plugin and this one
 *  event. The three hand-back functions act on its event; all other functions take from it the
 *  thread and the plugin, which stay right after the event is over and until the context ends.
 *  Hence a plugin may keep a context in its data and use it for timers, watchers and MQ_ContextData
 *  later, from any of its callbacks on that thread.
 *
 *  The MQ_SmtpConnection that a callback receives is this plugin's view of the connection, the same
 *  pointer in all events of the connection. An MQ_Message is good for the event that it came with.
 *
 *
 *  THREADS
 *
 *  There are `smtp-threads` worker threads, each with its own context. A connection stays on one of
 *  them; outgoing ones are all on the first. All callbacks for it, and all timers and watchers that were made with that context, run on
 *  that thread and one at a time, so data that is kept per context or per connection needs no lock.
 *  Data that is shared by several threads does. Callbacks of different workers do run in parallel,
 *  and no lock of Python's is held. A callback that blocks holds up every session of its worker.
 *
 *  Any thread, also one that the plugin started, may call MQ_Continue, MQ_Complete, MQ_Retry,
 *  MQ_SmtpSend and MQ_Log. Everything else is for the worker's thread; called from elsewhere it does
 *  nothing and is logged. A thread that has found an answer keeps it where the callback finds it,
 *  and calls MQ_Retry: the callback is then called again, on the worker's thread, and decides.
 *
 *
 *  MEMORY
 *
 *  Strings that a callback receives are NUL-terminated and borrowed: until the callback returns or,
 *  when it returned true, until the event is handed back. The size beside a pointer counts without
 *  the NUL and is what holds: a string may contain NUL bytes. Setters copy. Context data and
 *  connection data belong to the plugin, and mailerq never frees them: mq_context_cleanup and
 *  mq_smtp_in_close are where they end.
 *
 *  A plugin shares its process, and so the numbers of file descriptors. One that closes a descriptor
 *  which is not its own, most often by closing its own twice, hits a client, a file of the queue or
 *  another plugin. mailerq goes on where it can: the session ends, a port is opened again, and the log
 *  names the plugins. Set a descriptor to -1 when you have closed it.
 */
#ifndef MAILERQ_H
#define MAILERQ_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 *  The version of this interface, for mq_version to return. 1 is the interface of MailerQ 2.1; 2
 *  adds what is marked "Extension" below. Plugins of both versions are loaded.
 */
#define MQ_API_VERSION 2

/* Stands before a function that mailerq shall find when the rest is compiled with
 * -fvisibility=hidden, which is recommended. */
#if defined(__GNUC__) || defined(__clang__)
#define MQ_EXPORT __attribute__((visibility("default")))
#else
#define MQ_EXPORT
#endif

/* What a watcher waits for; they may be combined with |. The values are libev's. */
#define MQ_READ 1
#define MQ_WRITE 2

/* Extension: the priorities of MQ_Log. */
#define MQ_CRIT 1
#define MQ_WARN 2
#define MQ_INFO 3

/* The handles. */
typedef struct MQ_Context MQ_Context;
typedef struct MQ_SmtpConnection MQ_SmtpConnection;
typedef struct MQ_Message MQ_Message;
typedef struct MQ_IOWatcher MQ_IOWatcher;
typedef struct MQ_Timer MQ_Timer;

/* A libev event loop and a json-c value: include <ev.h> or <json-c/json.h> to work with them, and
 * link the plugin with -lev or -ljson-c. */
struct ev_loop;
struct json_object;


/* ========================================================================================
 *  Functions that a plugin exports. Every one but mq_version is optional.
 * ======================================================================================== */

/*
 *  The version that the plugin was compiled for: return MQ_API_VERSION. Called once, on the main
 *  thread, right after the file was opened. With a version that is not accepted, or without this
 *  function, mailerq says so and does not start.
 */
MQ_EXPORT int mq_version(void);

/*
 *  Start and end of the plugin. mq_initialize is called once in each process, on the main thread,
 *  after every plugin has been opened and before there is any context. mq_cleanup is the last call,
 *  once, on the main thread, after the last context has ended; it is called only when mq_initialize
 *  has returned. (One that throws a C++ exception keeps mailerq from starting: the plugins before it
 *  are cleaned up.) The file itself stays mapped until the process ends.
 *
 *  With smtp-processes: N there are N processes that know nothing of each other: each loads the
 *  plugins for itself, calls mq_initialize, and has contexts and connections of its own. A process
 *  that has ended is replaced by one that begins with mq_version again. What a plugin keeps in
 *  memory is of its process only; what must hold for all (a count, a cache that is dear, a file that
 *  one writes) belongs into a file, shared memory or a server, and a lock there must not stay taken
 *  when a process is killed.
 */
MQ_EXPORT void mq_initialize(void);
MQ_EXPORT void mq_cleanup(void);

/*
 *  Start and end of a worker thread, called on that thread. Either may be suspended by returning
 *  true: mailerq accepts no connection before every plugin has handed back mq_context_initialize on
 *  every worker, and a worker ends only after every plugin has handed back mq_context_cleanup. An
 *  mq_context_initialize that is given up keeps mailerq from starting.
 *
 *  The context of mq_context_initialize is good for as long as the worker lives. As an exception a
 *  plugin may hand back with it too, when exactly one of its events on this worker is in its hands;
 *  with none or more than one nothing is resumed, and that is logged.
 *
 *  After mq_context_cleanup the context is gone. Timers and watchers that are still there are
 *  removed without a call.
 */
MQ_EXPORT bool mq_context_initialize(MQ_Context *context);
MQ_EXPORT bool mq_context_cleanup(MQ_Context *context);

/*
 *  A client has connected. Called before the banner is sent, after the PROXY header was read if
 *  there is one. This is the place to set connection data.
 *  With MQ_Reject the reply replaces the banner and the connection is closed; on a port for implicit
 *  TLS, where nothing can be said yet, it is just closed.
 */
MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection);

/*
 *  The TLS handshake is done: after STARTTLS, or on a port for implicit TLS, there after
 *  mq_smtp_in_connect. MQ_SmtpSecure already says true.
 *  With MQ_Reject the reply is sent and the connection is closed.
 */
MQ_EXPORT bool mq_smtp_in_secure(MQ_Context *context, MQ_SmtpConnection *connection);

/*
 *  The client has sent a login and a password. Called before any login of the configuration is
 *  tried. A plugin that knows the answer calls MQ_SetSmtpAuthenticated with true or false and has
 *  decided; when several do, the last one holds. If no plugin decides, the configuration does.
 *  With MQ_Reject the login has failed, with that reply. The password must not be logged.
 */
MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize);

/*
 *  MAIL FROM and RCPT TO: the command is well-formed and the server itself would accept it; the
 *  reply has not been sent. The address comes without angle brackets; the null sender is "".
 *  With MQ_Reject that is the reply to the command.
 */
MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size);
MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size);

/*
 *  The whole message has come in; dot-stuffing has been removed, line endings are CRLF (but for what
 *  a client declares as BINARYMIME, which may hold any bytes). Called once for a transaction,
 *  however many recipients it has, before its messages are made. The text can be looked at here and
 *  changed in mq_smtp_in_message.
 *  With MQ_Reject that is the reply to the final dot, for all recipients.
 */
MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size);

/*
 *  The JSON of one message is complete and about to be published. Called once for each recipient,
 *  one after the other in the order of the RCPT commands. The x-mq-* headers have already been
 *  taken out of the body. What the plugins leave in the message is what is published: MQ_Envelope,
 *  MQ_Recipient and MQ_Mime are aliases of the JSON properties of these names, and the queue is
 *  chosen afterwards.
 *
 *  With MQ_Reject this recipient's message is not published. An event that fails (it is given up,
 *  throws an exception, or leaves a property of the wrong type) is a reject with 451. LMTP has a reply
 *  for each recipient. In SMTP one reply stands for all:
 *
 *      no message was accepted     a 4xx if there was any, otherwise the first 5xx
 *      some were accepted          250, which names the others. Each of these becomes a failure: a
 *                                  document with the reject as its result, in rabbitmq-failure and
 *                                  rabbitmq-results, and a line in the application log. After a 4xx
 *                                  the document keeps its body, so that it can be published again.
 *      the same, a 4xx among       that 4xx, for all: nothing is published, and the client tries all
 *      them has no such queue      recipients again, which plugins then see a second time
 *
 *  So a 4xx here does not always make the client try again, because SMTP cannot ask for that for one
 *  recipient of several. What can be decided in mq_smtp_in_rcptto is better refused there.
 */
MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message);

/*
 *  The connection is gone, whoever closed it. Called after every event of the connection that any
 *  plugin took has been handed back, also one that was given up before; it is the last time that the
 *  plugin sees this connection, and the place to free its connection data. There is nothing left to
 *  reject. While an event is never handed back this callback does not come, for no plugin.
 */
MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection);

/*
 *  An outgoing message: the remote server has answered 354 to DATA, and the body is about to be
 *  sent. MQ_Mime is that body, after personalisation and before DKIM signing and dot-stuffing; it is
 *  NULL when the message carries none. MQ_SetMime supplies or replaces it for this attempt. If
 *  neither the message nor a plugin supplies a body, the attempt ends with the result "nodata".
 *  With MQ_Reject nothing is sent, the connection is dropped, and the result of the attempt is that
 *  code: 4xx is tried again, 5xx is final.
 */
MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message);

/*
 *  The body and the final dot have been written, the reply is not in yet. Too late for MQ_Reject.
 *
 *  The outgoing callbacks of one message come with the same MQ_SmtpConnection, and so do those of the
 *  next message that is sent over the same connection. There is no callback for the end of an outgoing
 *  connection: keep nothing in its data that must be freed.
 */
MQ_EXPORT bool mq_smtp_out_sent(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message);

/*
 *  Message ids. A plugin that exports both functions owns the message ids; of several the last one
 *  in load order does, and the others are not called. mq_message_id_size is called once at start and
 *  says how large a buffer mq_message_id needs, from 1 to 998 bytes; another size keeps mailerq from
 *  starting.
 *
 *  mq_message_id is called for every message that has no id yet, on any thread and on several at
 *  once. It writes at most size bytes to buffer, needs no NUL, and returns how many it wrote. Ids must
 *  be unique. For mail without a Message-ID header the id makes one, <id@hostname>, so it has at most
 *  700 bytes of printable ASCII other than ()<>[]:;@," blank and backslash; dots only between others
 *  (RFC 5322, dot-atom-text). If what it wrote cannot be used, that is logged and the message gets an
 *  id from the built-in generator.
 */
MQ_EXPORT size_t mq_message_id_size(void);
MQ_EXPORT size_t mq_message_id(char *buffer, size_t size);


/* ========================================================================================
 *  Functions that mailerq offers.
 * ======================================================================================== */

/*
 *  Give control of an event back: see HANDING BACK above. Any thread. The context is the one that
 *  the callback received. What was done to the message or the connection before the call stays
 *  done, also with MQ_Retry; only a reject is forgotten by MQ_Retry.
 */
MQ_EXPORT void MQ_Continue(MQ_Context *context);
MQ_EXPORT void MQ_Complete(MQ_Context *context);
MQ_EXPORT void MQ_Retry(MQ_Context *context);

/*
 *  One pointer for each worker thread and plugin, for data that needs no lock; NULL at first. Every
 *  context of a worker gives the same pointer to the same plugin.
 */
MQ_EXPORT void *MQ_ContextData(MQ_Context *context);
MQ_EXPORT void MQ_SetContextData(MQ_Context *context, void *value);

/*
 *  The worker's libev loop, the same for all plugins and events of the worker; borrowed until
 *  mq_context_cleanup. It is made when it is first asked for. It runs: watchers that are started on
 *  it from any callback on the worker's thread, its own callbacks included, are called back on that
 *  thread, under the same rules as every other callback. Do not run, break or destroy the loop
 *  itself, and do not touch it from other threads, not even with ev_async_send: a thread hands back
 *  with MQ_Retry instead. It is not libev's default loop, so it has no child watchers. NULL when the
 *  system has no room for a loop.
 */
MQ_EXPORT struct ev_loop *MQ_ev(MQ_Context *context);

/*
 *  Watch a file descriptor: the callback is called on the worker's thread each time that fd is
 *  readable (MQ_READ) or writable (MQ_WRITE), with those of the two that it is, until MQ_IOUnwatch,
 *  which may be called from within. The fd stays the plugin's: close it after MQ_IOUnwatch. NULL
 *  when the fd or the events cannot be watched.
 */
MQ_EXPORT MQ_IOWatcher *MQ_IOWatch(MQ_Context *context, int fd, int events,
                                   void (*callback)(MQ_IOWatcher *watcher, int fd, int events,
                                                    void *data),
                                   void *data);
MQ_EXPORT void MQ_IOUnwatch(MQ_IOWatcher *watcher);

/*
 *  Call back once, on the worker's thread, after timeout seconds; a timeout of 0 or less is as soon
 *  as the present callback is over. MQ_TimerReset starts the time anew, MQ_TimerStop ends the timer
 *  without a call. A timer is gone when it has been stopped or its callback has been called;
 *  stopping or resetting it then, or from within its callback, does nothing. NULL when there is no
 *  memory.
 */
MQ_EXPORT MQ_Timer *MQ_TimerStart(MQ_Context *context, float timeout,
                                  void (*callback)(void *data), void *data);
MQ_EXPORT void MQ_TimerStop(MQ_Timer *timer);
MQ_EXPORT void MQ_TimerReset(MQ_Timer *timer, float timeout);

/*
 *  The socket, for getsockname and getpeername; reading or writing it breaks the session. Behind a
 *  proxy it is the proxy's. -1 when the connection is closed.
 */
MQ_EXPORT int MQ_SmtpFileDescriptor(MQ_SmtpConnection *connection);

/*
 *  Send raw bytes to the peer, copied, behind what mailerq has queued. Any thread. Returns size; 0
 *  when the connection is closed or buffer is NULL. This does not replace mailerq's own reply: for
 *  that there is MQ_Reject.
 */
MQ_EXPORT size_t MQ_SmtpSend(MQ_SmtpConnection *connection, const void *buffer, size_t size);

/*
 *  Whether the client has logged in. Setting it in any event of an incoming connection holds for the
 *  rest of the connection, and who is authenticated may relay. In mq_smtp_in_authenticate it is the
 *  plugin's answer, and false rejects the login.
 */
MQ_EXPORT bool MQ_SmtpAuthenticated(MQ_SmtpConnection *connection);
MQ_EXPORT void MQ_SetSmtpAuthenticated(MQ_SmtpConnection *connection, bool authenticated);

/*
 *  Extension. The client of an incoming connection, as mailerq believes it to be: behind a proxy
 *  (PROXY, XCLIENT) it is the proxy's client, of which MQ_SmtpFileDescriptor knows nothing.
 *
 *      MQ_ClientAddress      its IP address as text, "192.0.2.1" or "2001:db8::1"
 *      MQ_ClientPort         its port; 0 when it is unknown
 *      MQ_ClientHelo         the name in its latest EHLO, HELO or LHLO, as it sent it
 *      MQ_ClientLogin        the name that it has logged in with, or that a proxy gave
 *      MQ_ClientTlsVersion   such as "TLSv1.3"
 *      MQ_ClientTlsCipher    such as "TLS_AES_256_GCM_SHA384"
 *      MQ_ClientTlsName      the name in its certificate, where one was asked for and verified
 *
 *  NULL while there is none (no greeting yet, no login, no TLS), and for an outgoing connection. The
 *  text ends in NUL; its size without that goes to *size, which may be NULL. It is borrowed until the
 *  callback returns or, when it returned true, until the event is handed back: a later EHLO, login or
 *  XCLIENT replaces it.
 */
MQ_EXPORT const char *MQ_ClientAddress(MQ_SmtpConnection *connection, size_t *size);
MQ_EXPORT int MQ_ClientPort(MQ_SmtpConnection *connection);
MQ_EXPORT const char *MQ_ClientHelo(MQ_SmtpConnection *connection, size_t *size);
MQ_EXPORT const char *MQ_ClientLogin(MQ_SmtpConnection *connection, size_t *size);
MQ_EXPORT const char *MQ_ClientTlsVersion(MQ_SmtpConnection *connection, size_t *size);
MQ_EXPORT const char *MQ_ClientTlsCipher(MQ_SmtpConnection *connection, size_t *size);
MQ_EXPORT const char *MQ_ClientTlsName(MQ_SmtpConnection *connection, size_t *size);

/* Whether the connection is encrypted. */
MQ_EXPORT bool MQ_SmtpSecure(MQ_SmtpConnection *connection);

/* One pointer for each connection and plugin; NULL at first. */
MQ_EXPORT void *MQ_SmtpData(MQ_SmtpConnection *connection);
MQ_EXPORT void MQ_SetSmtpData(MQ_SmtpConnection *connection, void *data);

/*
 *  Extension. Answer the event that is being handled with this reply in place of the normal one, and
 *  skip the other plugins. What it means is said at each callback above. code is 400 to 599 (another
 *  one is logged and taken as 451). text is copied; it may be NULL, may start with an enhanced
 *  status code such as "5.7.1" (otherwise one that fits is added), and may have several lines.
 *
 *  MQ_Reject is no hand-back: return false after it, or, when the callback has already returned
 *  true, call MQ_Complete. Only the plugin that has the event can reject it.
 */
MQ_EXPORT void MQ_Reject(MQ_SmtpConnection *connection, int code, const char *text);

/*
 *  The message as a json-c object, built when a plugin first asks and read back after this plugin's
 *  callback has handed back. Borrowed until the event is over; a plugin that wants to keep it takes
 *  a reference of its own, but changes that it makes later are not seen. The body is the property
 *  "mime", a string that holds its exact bytes, whatever their encoding. NULL when there is no
 *  memory.
 *
 *  When a known property was given a value of the wrong type, or an envelope or recipient that is no
 *  address, the event fails at the end of this plugin's turn: 451 for an incoming message, another
 *  attempt later for an outgoing one, and the log names plugin and property.
 *
 *  Of an outgoing message this is the stored document: what is changed in it is seen in the results
 *  and by later attempts. MQ_SetMime and its like change only what this attempt sends.
 */
MQ_EXPORT struct json_object *MQ_Json(MQ_Message *message);

/*
 *  The envelope sender, the recipient, and the body; NULL when unset. Borrowed until the property is
 *  set again or the event is over; not to be written to. A body may hold NUL bytes: MQ_MimeSize tells
 *  where it ends. Of an outgoing message they are what is used on the wire.
 */
MQ_EXPORT const char *MQ_Envelope(MQ_Message *message);
MQ_EXPORT const char *MQ_Recipient(MQ_Message *message);
MQ_EXPORT const char *MQ_Mime(MQ_Message *message);

/*
 *  Extension. The number of bytes of what MQ_Mime gives; 0 when that is NULL.
 */
MQ_EXPORT size_t MQ_MimeSize(MQ_Message *message);

/*
 *  Set them; the bytes are copied, and NULL unsets. What cannot be used as an address fails the event
 *  at the end of this plugin's turn, and the log names the plugin. Of an outgoing message this
 *  changes the present attempt only, and only while the SMTP command that carries it has not been
 *  sent: in mq_smtp_out_data that leaves MQ_SetMime, and in mq_smtp_out_sent nothing. A call that
 *  comes too late is ignored and logged.
 */
MQ_EXPORT void MQ_SetEnvelope(MQ_Message *message, const char *envelope, size_t size);
MQ_EXPORT void MQ_SetRecipient(MQ_Message *message, const char *recipient, size_t size);
MQ_EXPORT void MQ_SetMime(MQ_Message *message, const char *mime, size_t size);

/*
 *  Extension. Whether an incoming message goes to the queue for local mail instead of the inbox.
 *  Where the configuration has neither, nor a smarthost, a local message is refused with 451.
 *  Of an outgoing message it is false, and setting it is ignored.
 */
MQ_EXPORT bool MQ_Local(MQ_Message *message);
MQ_EXPORT void MQ_SetLocal(MQ_Message *message, bool local);

/*
 *  Extension. Write one line to mailerq's log, with the plugin's name. Any thread; never blocks. The
 *  text is copied, cut at 4000 bytes, and control characters in it are escaped.
 */
MQ_EXPORT void MQ_Log(int priority, const char *message);

#ifdef __cplusplus
}
#endif

#endif
