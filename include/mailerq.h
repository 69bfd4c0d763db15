/*
 *  mailerq.h: the plugin interface of mailerq, and its manual.
 *
 *  A plugin is a shared object in the directory of the setting `plugin-directory`. At start, mailerq
 *  loads all files of that directory whose name ends in `.so` and does not start with a dot, in byte
 *  order of the names. Plugins are called in that order: `10-access.so` before `20-greylist.so`. This
 *  command builds a plugin. No library is linked: the running program supplies the MQ_ functions.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -Wall -o 10-access.so access.c
 *
 *  A plugin exports functions whose names start with `mq_`, in lower case. mailerq calls those that
 *  the plugin defines. Only mq_version is required:
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
 *  Functions that start with `MQ_` are provided by mailerq. C++ plugins work the same way: all of this
 *  header is inside extern "C", which gives your callbacks the right linkage.
 *
 *
 *  HANDING BACK
 *
 *  A callback that returns false has decided: mailerq calls the next plugin, and goes on after the
 *  last one. A callback that returns true takes control of this one event. The session of the event
 *  waits; other sessions go on. Later the plugin hands the event back with exactly one call of
 *
 *      MQ_Continue     call the next plugin,
 *      MQ_Complete     skip the other plugins and go on,
 *      MQ_Retry        start the event again with the first plugin.
 *
 *  The call may come from a timer, a watcher, a libev callback or a thread of the plugin. It may also
 *  come before the callback returns: `MQ_Continue(context); return true;`. These functions return at
 *  once and never call the next plugin themselves, so there is no recursion.
 *
 *  Mistakes are contained. A second hand-back, or one for an event that the plugin does not have, is
 *  ignored and logged with the name of the plugin. mailerq gives up an event that is not handed back
 *  within `plugin-timeout` (300 seconds by default; 0: never), that was retried 100 times, or whose
 *  callback throws a C++ exception. Then an incoming command is answered with 451, and an outgoing
 *  message is tried again later.
 *
 *  Each plugin that takes an event has the full plugin-timeout. The end of a mail is different:
 *  mq_smtp_in_data and all calls of mq_smtp_in_message for that mail share one plugin-timeout. After
 *  that time, each further event has one second, and all further events together have ten.
 *
 *  An event that was given up still belongs to the plugin. Its strings and its message stay valid, in
 *  memory or on disk, until the plugin hands the event back or its worker ends. `mailerq status` shows
 *  how many such events each plugin keeps, and how much mail they hold.
 *
 *  Crashes are reported. When a plugin crashes the process (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT)
 *  or ends it (exit, _exit), the last line on standard error and in the application log reads
 *  "SIGSEGV in mq_smtp_in_rcptto of plugin 10-access.so". mailerq does not change the exit status or
 *  the core dump. A callback that does not return is reported after `watchdog-seconds`. If it has not
 *  returned 5 seconds after `shutdown-timeout`, the process ends with status 70. A plugin that handles
 *  these signals itself must call the handlers that were installed before.
 *
 *
 *  HANDLES
 *
 *  MQ_Context *, MQ_SmtpConnection *, MQ_Message *, MQ_Timer * and MQ_IOWatcher * are handles, not
 *  addresses: never dereference them or compute with them. A handle is never reused for another
 *  object, so a late use does no harm: the function does nothing, returns NULL, false or 0, and in
 *  most cases logs the call.
 *
 *  The MQ_Context that a callback receives identifies the worker thread, the plugin and this one
 *  event. The three hand-back functions use the event. All other functions use the thread and the
 *  plugin, which stay valid after the event and until the context ends. So a plugin may store a
 *  context and use it later for timers, watchers and MQ_ContextData, from any of its callbacks on that
 *  thread.
 *
 *  The MQ_SmtpConnection that a callback receives is this plugin's view of the connection: the same
 *  pointer in all events of the connection. An MQ_Message is valid during its event only.
 *
 *
 *  THREADS
 *
 *  There are `smtp-threads` worker threads, each with its own context. A connection stays on one
 *  worker; outgoing connections are all on the first. Its callbacks, and the timers and watchers of
 *  that context, run on the thread of that worker, one at a time. So data per context or per
 *  connection needs no lock; data that several threads share does. Callbacks of different workers
 *  run in parallel, without Python's lock. A callback that blocks holds up every session of its
 *  worker.
 *
 *  Any thread, including a thread of the plugin, may call MQ_Continue, MQ_Complete, MQ_Retry,
 *  MQ_SmtpSend and MQ_Log. All other functions are for the thread of the worker; on another thread
 *  they do nothing and log the call. A thread that has an answer stores it where the callback finds
 *  it, and calls MQ_Retry: the callback then runs again on the thread of the worker, and decides.
 *
 *
 *  MEMORY
 *
 *  Strings that a callback receives are NUL-terminated and borrowed until the callback returns or,
 *  if it returns true, until the event is handed back. The size beside a pointer does not count the
 *  NUL. Use the size: a string may contain NUL bytes. Setters copy. Context data and connection data
 *  belong to the plugin, and mailerq never frees them: free them in mq_context_cleanup and
 *  mq_smtp_in_close.
 *
 *  A plugin shares the file descriptors of its process. A plugin that closes a descriptor of others,
 *  most often by closing its own twice, hits a client, a file of the queue or another plugin. mailerq
 *  goes on if it can: the session ends, a port is opened again, and the log names the plugins. Set a
 *  descriptor to -1 after closing it.
 */
#ifndef MAILERQ_H
#define MAILERQ_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 *  The version of this interface, the return value of mq_version. Version 1 is the interface of
 *  MailerQ 2.1; version 2 adds what is marked "Extension" below. Plugins of both versions are loaded.
 */
#define MQ_API_VERSION 2

/* Makes a function visible to mailerq when the plugin is compiled with -fvisibility=hidden, which is
 * recommended. */
#if defined(__GNUC__) || defined(__clang__)
#define MQ_EXPORT __attribute__((visibility("default")))
#else
#define MQ_EXPORT
#endif

/* The events of a watcher, which may be combined with |. The values are those of libev. */
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

/* A libev event loop and a json-c value. To use them, include <ev.h> or <json-c/json.h>, and link the
 * plugin with -lev or -ljson-c. */
struct ev_loop;
struct json_object;


/* ========================================================================================
 *  Functions that a plugin exports. All except mq_version are optional.
 * ======================================================================================== */

/*
 *  Return MQ_API_VERSION, the version that the plugin was compiled for. Called once, on the main
 *  thread, right after the file was loaded. If the function is missing or its version is not
 *  accepted, mailerq reports an error and does not start.
 */
MQ_EXPORT int mq_version(void);

/*
 *  Start and end of the plugin. mq_initialize is called once in each process, on the main thread,
 *  after all plugins were loaded and before any context exists. mq_cleanup is the last call, once, on
 *  the main thread, after the last context has ended. It is called only if mq_initialize returned. If
 *  mq_initialize throws a C++ exception, the plugins before it are cleaned up and mailerq does not
 *  start. The file stays mapped until the process ends.
 *
 *  With smtp-processes: N there are N independent processes. Each loads the plugins, calls
 *  mq_initialize, and has its own contexts and connections. A process that ends is replaced by a new
 *  one, which starts with mq_version again. Memory of a plugin belongs to one process. State that all
 *  processes share (a counter, an expensive cache, a file that one of them writes) belongs in a file,
 *  in shared memory or on a server; a lock on it must be released when its process is killed.
 */
MQ_EXPORT void mq_initialize(void);
MQ_EXPORT void mq_cleanup(void);

/*
 *  Start and end of a worker thread, called on that thread. Both may return true to suspend: mailerq
 *  accepts no connection until every plugin has handed back mq_context_initialize on every worker, and
 *  a worker ends only after every plugin has handed back mq_context_cleanup. If mq_context_initialize
 *  is given up, mailerq does not start.
 *
 *  The context of mq_context_initialize is valid until the worker ends. As an exception, a plugin may
 *  use this context to hand back too, while it has exactly one event on this worker. With no event or
 *  several, nothing is resumed and the call is logged.
 *
 *  After mq_context_cleanup the context is gone. Remaining timers and watchers are removed without
 *  being called.
 */
MQ_EXPORT bool mq_context_initialize(MQ_Context *context);
MQ_EXPORT bool mq_context_cleanup(MQ_Context *context);

/*
 *  A client has connected. Called before the banner is sent, and after the PROXY header, if any, was
 *  read. Set connection data here.
 *  MQ_Reject replaces the banner and closes the connection. On a port for implicit TLS no reply can be
 *  sent yet: the connection is just closed.
 */
MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection);

/*
 *  The TLS handshake is done. Called after STARTTLS, or after mq_smtp_in_connect on a port for implicit
 *  TLS. MQ_SmtpSecure already returns true.
 *  MQ_Reject sends the reply and closes the connection.
 */
MQ_EXPORT bool mq_smtp_in_secure(MQ_Context *context, MQ_SmtpConnection *connection);

/*
 *  The client has sent a login and a password. Called before the logins of the configuration are
 *  tried. A plugin decides by calling MQ_SetSmtpAuthenticated with true or false; if several do, the
 *  last call counts. If no plugin decides, the configuration does. MQ_Reject fails the login with that
 *  reply. Never log the password.
 */
MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize);

/*
 *  MAIL FROM and RCPT TO. The command is well-formed, the server itself would accept it, and no reply
 *  has been sent. The address has no angle brackets; the null sender is "".
 *  MQ_Reject sets the reply to the command.
 */
MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size);
MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size);

/*
 *  The whole mail has been received, without dot-stuffing and with CRLF line endings. (A mail that the
 *  client declared as BINARYMIME may hold any bytes.) Called once for each transaction, whatever the
 *  number of recipients, before the messages are made. The text can be read here and changed in
 *  mq_smtp_in_message.
 *  MQ_Reject sets the reply to the final dot, for all recipients.
 */
MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size);

/*
 *  The JSON of one message is complete and about to be published. Called for each recipient in turn,
 *  in the order of the RCPT commands. The x-mq-* header fields are already removed from the body. The
 *  message is published as the plugins leave it: MQ_Envelope, MQ_Recipient and MQ_Mime are aliases of
 *  the JSON properties of these names, and the queue is chosen afterwards.
 *
 *  MQ_Reject keeps the message of this recipient from being published. An event that fails (it is
 *  given up, throws an exception, or leaves a property of the wrong type) counts as a reject with 451.
 *  LMTP has a reply for each recipient. SMTP has one reply for all:
 *
 *      all rejected                a 4xx if there is one, otherwise the first 5xx
 *      some accepted               250, which names the rejected recipients. Each of these becomes a
 *                                  failure: a document with the reject as its result in
 *                                  rabbitmq-failure and rabbitmq-results, and a line in the
 *                                  application log. After a 4xx the document keeps its body, so that
 *                                  it can be published again.
 *      some accepted, and a        that 4xx for all: nothing is published, and the client tries all
 *      4xx has no such queue       recipients again, so plugins see them a second time
 *
 *  So a 4xx here does not always make the client try again: SMTP has no such reply for one recipient
 *  of several. Reject in mq_smtp_in_rcptto whatever can be decided there.
 */
MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message);

/*
 *  The connection was closed, by either side. This is the last callback of the connection: free the
 *  connection data here. It is called after all events of the connection, including those that were
 *  given up, have been handed back by all plugins. If one event is never handed back, no plugin gets
 *  this callback. MQ_Reject has no effect.
 */
MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection);

/*
 *  An outgoing message: the peer has answered 354 to DATA, and the body is about to be sent. MQ_Mime is
 *  that body, after personalisation and before DKIM signing and dot-stuffing, or NULL if the message
 *  has none. MQ_SetMime supplies or replaces the body for this attempt. If neither the message nor a
 *  plugin supplies a body, the attempt ends with the result "nodata".
 *  After MQ_Reject nothing is sent, the connection is dropped, and the code is the result of the
 *  attempt: 4xx is tried again, 5xx is final.
 */
MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message);

/*
 *  The body and the final dot have been written, and the reply has not arrived. MQ_Reject is too late.
 *
 *  All outgoing callbacks of a connection get the same MQ_SmtpConnection, also for later messages on
 *  that connection. The end of an outgoing connection has no callback: keep nothing in its data that
 *  must be freed.
 */
MQ_EXPORT bool mq_smtp_out_sent(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message);

/*
 *  Message ids. A plugin that exports both functions supplies the message ids. If several do, only the
 *  last one in load order is called. mq_message_id_size is called once at start and returns the size
 *  of the buffer for mq_message_id, from 1 to 998 bytes. With another size mailerq does not start.
 *
 *  mq_message_id is called for each message without an id, on any thread and on several at once. It
 *  writes at most size bytes to buffer, without a NUL, and returns the number of bytes written. Ids
 *  must be unique. A mail without a Message-ID header gets the header <id@hostname>, so an id has at
 *  most 700 bytes of printable ASCII except ()<>[]:;@," blank and backslash, and dots only between
 *  other characters (RFC 5322, dot-atom-text). An id that cannot be used is logged, and the message
 *  gets an id of the built-in generator.
 */
MQ_EXPORT size_t mq_message_id_size(void);
MQ_EXPORT size_t mq_message_id(char *buffer, size_t size);


/* ========================================================================================
 *  Functions that mailerq provides.
 * ======================================================================================== */

/*
 *  Hand an event back: see HANDING BACK above. Any thread. The context is the one that the callback
 *  received. Changes to the message or the connection stay, also with MQ_Retry; but MQ_Retry drops a
 *  reject.
 */
MQ_EXPORT void MQ_Continue(MQ_Context *context);
MQ_EXPORT void MQ_Complete(MQ_Context *context);
MQ_EXPORT void MQ_Retry(MQ_Context *context);

/*
 *  One pointer for each worker thread and plugin, for data that needs no lock; NULL at first. All
 *  contexts of a worker return the same pointer to the same plugin.
 */
MQ_EXPORT void *MQ_ContextData(MQ_Context *context);
MQ_EXPORT void MQ_SetContextData(MQ_Context *context, void *value);

/*
 *  The libev loop of the worker, shared by all plugins and events of the worker; borrowed until
 *  mq_context_cleanup. The first call creates the loop, and mailerq runs it. Start watchers on the loop
 *  from any callback on the thread of the worker, including callbacks of the loop. Watchers are called
 *  on that thread, under the rules of every other callback. Do not run, break or destroy the loop, and
 *  do not use it on other threads, not even for ev_async_send: a thread calls MQ_Retry instead. The
 *  loop is not the default loop of libev, so it has no child watchers. Returns NULL if the system
 *  cannot create a loop.
 */
MQ_EXPORT struct ev_loop *MQ_ev(MQ_Context *context);

/*
 *  Watch a file descriptor. The callback is called on the thread of the worker each time fd is
 *  readable (MQ_READ) or writable (MQ_WRITE), until MQ_IOUnwatch; its argument `events` says which.
 *  The callback may call MQ_IOUnwatch. The fd belongs to the plugin: close it after MQ_IOUnwatch.
 *  Returns NULL if the fd or the events cannot be watched.
 */
MQ_EXPORT MQ_IOWatcher *MQ_IOWatch(MQ_Context *context, int fd, int events,
                                   void (*callback)(MQ_IOWatcher *watcher, int fd, int events,
                                                    void *data),
                                   void *data);
MQ_EXPORT void MQ_IOUnwatch(MQ_IOWatcher *watcher);

/*
 *  Call the callback once, on the thread of the worker, after timeout seconds; with a timeout of 0 or
 *  less, as soon as the current callback returns. MQ_TimerReset restarts the timer with a new timeout;
 *  MQ_TimerStop removes the timer without a call. A timer ends when it is stopped or when its callback
 *  is called. After that, and within its callback, stopping or resetting it does nothing. Returns NULL
 *  if the system has no memory for it, or no file descriptors for the loop.
 */
MQ_EXPORT MQ_Timer *MQ_TimerStart(MQ_Context *context, float timeout,
                                  void (*callback)(void *data), void *data);
MQ_EXPORT void MQ_TimerStop(MQ_Timer *timer);
MQ_EXPORT void MQ_TimerReset(MQ_Timer *timer, float timeout);

/*
 *  The socket, for getsockname and getpeername; reading or writing it breaks the session. Behind a
 *  proxy the peer of the socket is the proxy. -1 if the connection is closed.
 */
MQ_EXPORT int MQ_SmtpFileDescriptor(MQ_SmtpConnection *connection);

/*
 *  Send raw bytes to the peer, after the output that is already queued. The bytes are copied. Any
 *  thread. Returns size, or 0 if the connection is closed or buffer is NULL. This does not replace the
 *  reply of mailerq: use MQ_Reject for that.
 */
MQ_EXPORT size_t MQ_SmtpSend(MQ_SmtpConnection *connection, const void *buffer, size_t size);

/*
 *  Whether the client has logged in. The value may be set in any event of an incoming connection and
 *  holds for the rest of the connection. An authenticated client may relay. In mq_smtp_in_authenticate
 *  the value is the plugin's answer, and false rejects the login.
 */
MQ_EXPORT bool MQ_SmtpAuthenticated(MQ_SmtpConnection *connection);
MQ_EXPORT void MQ_SetSmtpAuthenticated(MQ_SmtpConnection *connection, bool authenticated);

/*
 *  Extension. The client of an incoming connection. Behind a proxy (PROXY, XCLIENT) this is the client
 *  of the proxy, while MQ_SmtpFileDescriptor is the connection to the proxy.
 *
 *      MQ_ClientAddress      its IP address as text, "192.0.2.1" or "2001:db8::1"
 *      MQ_ClientPort         its port; 0 if unknown
 *      MQ_ClientHelo         the name in its latest EHLO, HELO or LHLO, as sent
 *      MQ_ClientLogin        its login name, from AUTH or from a proxy
 *      MQ_ClientTlsVersion   such as "TLSv1.3"
 *      MQ_ClientTlsCipher    such as "TLS_AES_256_GCM_SHA384"
 *      MQ_ClientTlsName      the name in its certificate, if one was requested and verified
 *
 *  NULL if there is no value (no greeting yet, no login, no TLS), and for an outgoing connection. The
 *  text is NUL-terminated; its size without the NUL is stored in *size, unless size is NULL. The text
 *  is borrowed until the callback returns or, if it returns true, until the event is handed back: a
 *  later EHLO, login or XCLIENT replaces it.
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
 *  Extension. Answer the current event with this reply instead of the normal one, and skip the other
 *  plugins. Each callback above says what that means. code is 400 to 599; another code is logged and
 *  becomes 451. text is copied. It may be NULL, may have several lines, and may start with an enhanced
 *  status code such as "5.7.1"; otherwise a fitting one is added.
 *
 *  MQ_Reject does not hand back: return false after it or, if the callback has already returned true,
 *  call MQ_Complete. Only the plugin that has the event can reject it.
 */
MQ_EXPORT void MQ_Reject(MQ_SmtpConnection *connection, int code, const char *text);

/*
 *  The message as a json-c object. The object is built on the first call, and read back when this
 *  plugin has decided or handed back. It is borrowed until the event is over. A plugin may keep it with
 *  a reference of its own, but later changes are ignored. The body is the property "mime", a string
 *  with the exact bytes, whatever their encoding. Returns NULL if there is no memory.
 *
 *  If a known property has a value of the wrong type, or the envelope or recipient is not an address,
 *  the event fails at the end of this plugin's turn: an incoming message gets 451, an outgoing message
 *  is tried again later, and the log names the plugin and the property.
 *
 *  For an outgoing message this is the stored document: changes appear in the results and in later
 *  attempts. MQ_SetEnvelope, MQ_SetRecipient and MQ_SetMime change only what this attempt sends.
 */
MQ_EXPORT struct json_object *MQ_Json(MQ_Message *message);

/*
 *  The envelope sender, the recipient and the body; NULL if unset. Read-only, and borrowed until the
 *  property is set again or the event is over. A body may hold NUL bytes: MQ_MimeSize has its size. For
 *  an outgoing message these are the values on the wire.
 */
MQ_EXPORT const char *MQ_Envelope(MQ_Message *message);
MQ_EXPORT const char *MQ_Recipient(MQ_Message *message);
MQ_EXPORT const char *MQ_Mime(MQ_Message *message);

/*
 *  Extension. The size of the body in bytes; 0 if MQ_Mime is NULL.
 */
MQ_EXPORT size_t MQ_MimeSize(MQ_Message *message);

/*
 *  Set the envelope sender, the recipient or the body. The bytes are copied; NULL unsets. Text that is
 *  not an address fails the event at the end of this plugin's turn, and the log names the plugin. For
 *  an outgoing message the change applies to this attempt only, and must come before the value is
 *  sent: mq_smtp_out_data can still call MQ_SetMime, and mq_smtp_out_sent none. A late call is ignored
 *  and logged.
 */
MQ_EXPORT void MQ_SetEnvelope(MQ_Message *message, const char *envelope, size_t size);
MQ_EXPORT void MQ_SetRecipient(MQ_Message *message, const char *recipient, size_t size);
MQ_EXPORT void MQ_SetMime(MQ_Message *message, const char *mime, size_t size);

/*
 *  Extension. Whether an incoming message goes to the queue for local mail instead of the inbox. If
 *  the configuration has neither queue and no smarthost, a local message is refused with 451. For an
 *  outgoing message the value is false, and setting it is ignored.
 */
MQ_EXPORT bool MQ_Local(MQ_Message *message);
MQ_EXPORT void MQ_SetLocal(MQ_Message *message, bool local);

/*
 *  Extension. Write one line to the log of mailerq, with the name of the plugin. Any thread; never
 *  blocks. The text is copied and cut at 4000 bytes, and control characters are escaped.
 */
MQ_EXPORT void MQ_Log(int priority, const char *message);

#ifdef __cplusplus
}
#endif

#endif
